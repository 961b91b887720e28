"""Original checkpoint files: their names and layouts, strict reading, adapting, and loading by plan and commit."""
