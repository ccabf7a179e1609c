"""Our models inside the harnesses people evaluate with.

**lmms-eval** (extra ``lmms-eval``) finds `llava_lab` by its entry point:

    python -m lmms_eval --model llava_lab --model_args pretrained=tiny --tasks pope --force_simple

Multiple choice there takes the least of what ``loglikelihood`` gives, a mean loss. Its own wrapper of LLaVA (0.7.3, ``llava_hf``)
counts the question's tokens without expanding the picture's, so that with today's processors the loss runs over 575 image tokens
and the question as well, and compares greedy tokens that are one place off; `continuation` here scores the answer's tokens alone.
And its evaluator makes a text of what ``loglikelihood`` gives, so that multiple choice ends in an error; ours comes through.

**VLMEvalKit** has no entry points. A lab is registered in a few lines, then its own runner is called:

    from llava_lab.evaluation.harness.vlmeval import register
    register("tiny")  # as llava-lab-tiny
    from vlmeval.inference import infer_data_job

Both also evaluate any OpenAI-compatible server without a plug-in, such as ``llava-lab serve``.
"""
