"""DeepSpeed's ZeRO as an engine: its settings, its weights, the engine."""
