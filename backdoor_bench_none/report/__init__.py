"""Tables, reports and pictures of results."""
