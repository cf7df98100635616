"""The fastest of the forms that compute the same, measured and chosen."""
