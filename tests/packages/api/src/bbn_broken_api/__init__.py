"""Needs a newer core."""

bbn_api_version = 99
