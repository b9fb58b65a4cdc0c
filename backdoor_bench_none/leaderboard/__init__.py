"""The leaderboard: tracks with rules, submissions whose numbers can be recomputed, and the site made of them."""
