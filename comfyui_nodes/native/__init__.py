"""ComfyUI's own MODEL, quantized. Imported when a node first runs: it loads comfy and diffusers_ldmq."""
