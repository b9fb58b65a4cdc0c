"""The leaderboard: tracks with rules, submissions whose numbers can be computed again, and the site made of them."""
