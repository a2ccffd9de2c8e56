"""One module per revision; each runs SQL files of its own, which never change once released."""
