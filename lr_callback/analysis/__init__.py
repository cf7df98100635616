"""From a model to what each of its layers can become."""
