"""The command `bbn`, one module per group of verbs; torch is imported by the verbs that need it only."""
