"""What plugins implement and what they are given. Nothing in here trains, reads files or knows a registry."""
