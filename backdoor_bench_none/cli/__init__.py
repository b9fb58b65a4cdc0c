"""The command `bbn`: one module per group of verbs. Nothing here imports torch before a verb needs it."""
