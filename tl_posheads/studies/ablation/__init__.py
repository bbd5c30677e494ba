"""The ablation study, from the sets of heads to the sentence on what they matter for.

- ``controls``: which heads are ablated beside the top ones; ``effects``: the statistics.
- ``power``: how small an effect could be found; ``budget``: how much fits into a time;
  ``conditions``: the list of ablations.
- ``screen``: what any ablation would do, estimated; ``trial``: a prompt under all of them.
- ``pilot``: the passes that a plan rests on; ``verdicts``, ``figure``: sentences and picture.
- ``results``: tables and files; ``run``: the study itself.
- ``dose_controls``, ``dose_results``, ``dose``: the same question by degrees, with edits of rotary
  pairs, beside other pairs and heads.

Modules import those named before them, never those after.
"""
