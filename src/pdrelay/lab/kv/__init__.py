"""`pdrelay kv`: what a hand-over costs, measured and predicted."""
