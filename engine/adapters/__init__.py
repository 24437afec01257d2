"""LoRA adapters in PEFT's format: read with distrust, merged into a model's weights, or computed beside them."""
