"""Commands that several tests give."""

SCORE = ("score", "PLACE/llama", "--corpus", "PLACE/text.txt", "--docs", 3, "--length", 60)
