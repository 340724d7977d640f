"""A renderer from the checkpoint's own chat template and processor, for any model family.

messages ─chat_template.py─▶ text with one placeholder per image
         ─encoder.py───────▶ each placeholder becomes the image's replacement, and the whole is tokenized together
         ─template_format.py▶ tokens, placeholders with gaps, bridges, the tokens that a policy samples

image_text.py   each distinct image through the whole processor, once: tensors and replacement
answers.py      where answers begin and end, found by comparing renders
surprises.py    what a template does beyond writing the messages down, found by comparing renders
"""
