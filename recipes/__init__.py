"""The recipes that come with Paretron."""
