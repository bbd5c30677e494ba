"""Ablation studies: of sets of heads, of single heads, and of rotary pairs by degrees.

Modules import those named before them, never those after: ``controls``, ``conditions``,
``positive_control`` (which heads); ``norms``, ``attribution``, ``trial`` (passes); ``budget``,
``rounds``, ``verdicts``, ``results``, ``run`` (sets); ``head_effects_results``, ``head_effects``,
``association`` (single heads); ``dose_controls``, ``dose_results``, ``dose`` (rotary pairs).
"""
