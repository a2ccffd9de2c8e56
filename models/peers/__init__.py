"""Whom adaptation has to beat: recommenders of the field, batched, tuned on validation users, learning online."""
