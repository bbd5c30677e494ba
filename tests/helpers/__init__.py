"""What several test files share: small models, planted truths, references by hand."""
