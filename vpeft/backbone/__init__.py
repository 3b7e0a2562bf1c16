"""All that is known of timm's insides: where a model's parts are, and what its attentions and blocks compute."""
