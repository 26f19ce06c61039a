"""Scoring and generating beside lm-evaluation-harness: same tiny random model, same items, same batch size, own processes.

    python tests/bench_evaluation.py                       # ours alone: shared prompts against every choice by itself
    python tests/bench_evaluation.py --harness FOLDER      # FOLDER: where `pip install --target FOLDER lm_eval` put it
    python tests/bench_evaluation.py --harness FOLDER --kinds letters --rounds 7

The processes stay up and take turns, one round each, so that whatever else the machine does meets all of them. Printed are
items (or tokens of replies) a second of processor time on one thread, the median of the ratios of neighbouring rounds with
the lowest and the highest, and on how many items both chose, or wrote, the same. The model of `generation` is made to end
its replies after very different lengths; all sides read the same names of its end tokens.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = dict(vocab_size=600, hidden_size=384, intermediate_size=1024, num_hidden_layers=6)
KINDS = ('texts', 'letters', 'generation')
PLACES = '臺北 基隆 新竹 苗栗 臺中 彰化 南投 雲林 嘉義 臺南 高雄 屏東 宜蘭 花蓮 臺東 澎湖'.split()
THINGS = '碗粿 牛肉湯 茶葉 芒果 鳳梨 米粉 貢丸 肉圓 太陽餅 麻糬'.split()


def make_items(count, kind):
    "Six choices with one prompt: a long one, as TruthfulQA's in the harness, with several questions before the real one."
    items = []
    for number in range(count):
        draw = random.Random(number)
        ask = lambda: f'{draw.choice(PLACES)}人請客的時候，為什麼常常端出{draw.choice(THINGS)}，而不是{draw.choice(THINGS)}？'
        shots = draw.randint(0, 6) if kind == 'generation' else draw.randint(4, 6)
        before = ''.join(f'問：{ask()}\n答：因為當地人從小吃到大。\n' for _ in range(shots))
        texts = [f'因為{draw.choice(PLACES)}的{draw.choice(THINGS)}比{draw.choice(PLACES)}的便宜{number}成' for number in range(1, 7)]
        items.append({'prompt': f'{before}問：{ask()}', 'choices': list('ABCDEF') if kind == 'letters' else texts})
    return items


def make_models(place):
    "A small Gemma-2 with random weights, and one whose replies end: its head is not its embedding, and nine tokens are ends."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from kyara.sft import make_student
    texts = [item['prompt'] + ''.join(item['choices']) for kind in ('texts', 'letters') for item in make_items(40, kind)]
    scored = str(make_student(texts, Path(place) / 'scored', **SIZE))
    tokenizer, config = AutoTokenizer.from_pretrained(scored), AutoModelForCausalLM.from_pretrained(scored).config
    ends = [f'<end_{number}>' for number in range(9)]
    tokenizer.add_special_tokens({'additional_special_tokens': ends})
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), False
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)]
    for part in (model, tokenizer): part.save_pretrained(Path(place) / 'writing')
    return scored, str(Path(place) / 'writing')


# Each side gives a function that measures one round: seconds, tokens of replies, and values or replies

def open_ours(folder, args, alone=False):
    from kyara.core import ModelSettings
    from kyara.evaluate import answer_loglikelihoods
    from kyara.llm import Client
    def score(items):
        # A prompt that differs by its first character shares nothing.
        prompt = lambda item, place: [{'role': 'user', 'content': str(place) * alone + item['prompt']}]
        pairs = [(prompt(item, place), choice) for item in items for place, choice in enumerate(item['choices'])]
        start = time.process_time()
        values = [value for value, _, _ in answer_loglikelihoods(folder, pairs, args.batch_size)]
        return time.process_time() - start, 0, values
    def write(items):
        client = Client(ModelSettings('bench', 'local', folder, concurrency=args.batch_size), ':memory:')
        start = time.process_time()
        replies = client.ask([[{'role': 'user', 'content': item['prompt']}] for item in items], max_tokens=args.limit)
        seconds = time.process_time() - start
        return seconds, sum(reply.usage['output_tokens'] for reply in replies), [reply.text.strip() for reply in replies]
    return write if args.kind == 'generation' else score


def open_harness(folder, args):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer
    model = HFLM(pretrained=folder, batch_size=args.batch_size, device='cpu', dtype='float32')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    def context(item):
        turn = [{'role': 'user', 'content': item['prompt']}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    def score(items):
        pairs = [(context(item), choice) for item in items for choice in item['choices']]
        requests = [Instance('loglikelihood', {}, pair, place) for place, pair in enumerate(pairs)]
        start = time.process_time()
        values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
        return time.process_time() - start, 0, values
    def write(items):
        words = {'until': [], 'do_sample': False, 'max_gen_toks': args.limit}
        requests = [Instance('generate_until', {}, (context(item), words), place) for place, item in enumerate(items)]
        start = time.process_time()
        texts = model.generate_until(requests, disable_tqdm=True)
        return time.process_time() - start, 0, [text.strip() for text in texts]
    return write if args.kind == 'generation' else score


def serve(args):
    "Measure a round for each line that comes in."
    items = make_items(args.items, args.kind)
    measure = open_harness(args.folder, args) if args.side == 'harness' else open_ours(args.folder, args, args.side == 'alone')
    measure(items[:2])
    for _ in sys.stdin: print('RESULT', json.dumps(measure(items)), flush=True)


# The race

def start_side(side, kind, folder, args):
    words = ['--side', side, '--kind', kind, '--folder', folder, '--items', str(args.items), '--batch-size', str(args.batch_size), '--limit', str(args.limit)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'} | ({'PYTHONPATH': args.harness} if side == 'harness' else {})
    return subprocess.Popen([sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            text=True, env=environment)


def one_round(process):
    process.stdin.write('go\n')
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith('RESULT '): return json.loads(line.removeprefix('RESULT '))
    raise SystemExit(f'{process.args} ended; start it by hand to see why')


def choices_of(values, width=6):
    if isinstance(values[0], str): return values
    rows = [values[start:start + width] for start in range(0, len(values), width)]
    return [max(range(width), key=row.__getitem__) for row in rows]


def race(kind, sides, folder, args):
    args = argparse.Namespace(**{**vars(args), 'items': args.items or (192 if kind == 'generation' else 48)})
    processes = {side: start_side(side, kind, folder, args) for side in sides}
    rounds = [{side: one_round(process) for side, process in processes.items()} for _ in range(args.rounds)]
    for process in processes.values(): process.communicate()
    ours, tokens = choices_of(rounds[0]['ours'][2]), rounds[0]['ours'][1]
    for side in sides:
        best = min(results[side][0] for results in rounds)
        ratios = sorted(results[side][0] / results['ours'][0] for results in rounds)
        same = sum(one == other for one, other in zip(ours, choices_of(rounds[0][side][2])))
        speed = f'{tokens / best:7.0f} tokens/s' if tokens else f'{args.items / best:8.1f} items/s'
        note = '' if side == 'alone' else f'; the same {"reply" if tokens else "choice"} on {same} of {args.items}'
        print(f'{kind:11}{side:8}{speed}; ours takes {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) times less{note}', flush=True)


def main(args):
    with tempfile.TemporaryDirectory() as place:
        scored, writing = make_models(place)
        for kind in args.kinds:
            alone = [] if kind == 'generation' else ['alone']
            race(kind, ['ours', *(['harness'] if args.harness else []), *alone], writing if kind == 'generation' else scored, args)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--harness', default='', help='folder that holds lm_eval')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS)
    parser.add_argument('--items', type=int, default=0, help='0: 48 of choices, 192 of generation (two minutes a round)')
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--limit', type=int, default=192, help='tokens of a reply at most')
    parser.add_argument('--rounds', type=int, default=3)
    for internal in ('--side', '--kind', '--folder'): parser.add_argument(internal, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side: serve(given)
    else: main(given)
