"""The only code that opens model files: guarded reader, staged writer, manifest, model card."""
