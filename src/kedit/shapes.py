"""The letters that stand for axis lengths in every docstring and comment of kedit.

| letter | meaning |
| --- | --- |
| E | edits optimised together |
| P | prompts (rows of a token batch); each belongs to one edit |
| T | tokens of the longest row; Tq, Tk where queries and keys differ |
| S | sites of one edit at which a value is written (1; 2 in PMET) |
| L | blocks of the model |
| A | attention heads; G: query heads per key/value head |
| D | width of one head |
| R | captured query rows per prompt |
| H | width of the residual stream |
| I | input width of the down-projection: length of a key k |
| O | output width of the down-projection: length of a value v |
| V | size of the vocabulary |
| r | rank of an update |
"""
