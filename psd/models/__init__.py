"""Everything that is loaded: priors, rewards, and where their weights come from. Below it nothing knows a model."""
