"""Log-likelihood scoring beside lm-evaluation-harness: same tiny model, same items, same batch size, each in its own process.

    python tests/bench_evaluation.py                       # ours alone: shared prompts against every choice by itself
    python tests/bench_evaluation.py --harness FOLDER      # FOLDER: where `pip install --target FOLDER lm_eval` put it

It prints items a second of processor time on one thread (best of `--repeats`; other work on the machine does not count)
for choices that are full texts and for single letters, and whether both chose the same on every item.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = dict(vocab_size=600, hidden_size=384, intermediate_size=1024, num_hidden_layers=6)
PLACES = '臺北 基隆 新竹 苗栗 臺中 彰化 南投 雲林 嘉義 臺南 高雄 屏東 宜蘭 花蓮 臺東 澎湖'.split()
THINGS = '碗粿 牛肉湯 茶葉 芒果 鳳梨 米粉 貢丸 肉圓 太陽餅 麻糬'.split()


def make_items(count, letters):
    "Six choices with one prompt: a long one, as TruthfulQA's in the harness, with several questions before the real one."
    items = []
    for number in range(count):
        draw = random.Random(number)
        ask = lambda: f'{draw.choice(PLACES)}人請客的時候，為什麼常常端出{draw.choice(THINGS)}，而不是{draw.choice(THINGS)}？'
        before = ''.join(f'問：{ask()}\n答：因為當地人從小吃到大。\n' for _ in range(draw.randint(4, 6)))
        texts = [f'因為{draw.choice(PLACES)}的{draw.choice(THINGS)}比{draw.choice(PLACES)}的便宜{number}成' for number in range(1, 7)]
        items.append({'prompt': f'{before}問：{ask()}', 'choices': list('ABCDEF') if letters else texts})
    return items


def measure_ours(folder, items, batch_size, alone):
    from kyara.evaluate import answer_loglikelihoods
    # A prompt that differs by its first character shares nothing.
    prompt = lambda item, place: [{'role': 'user', 'content': str(place) * alone + item['prompt']}]
    pairs = [(prompt(item, place), choice) for item in items for place, choice in enumerate(item['choices'])]
    answer_loglikelihoods(folder, pairs[:6], batch_size)
    start = time.process_time()
    values = [value for value, _, _ in answer_loglikelihoods(folder, pairs, batch_size)]
    return time.process_time() - start, values


def measure_harness(folder, items, batch_size):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer
    model = HFLM(pretrained=folder, batch_size=batch_size, device='cpu', dtype='float32')
    tokenizer, requests = AutoTokenizer.from_pretrained(folder), []
    for item in items:
        turn = [{'role': 'user', 'content': item['prompt']}]
        context = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        requests += [Instance('loglikelihood', {}, (context, choice), len(requests)) for choice in item['choices']]
    model.loglikelihood(requests[:6], disable_tqdm=True)
    start = time.process_time()
    values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return time.process_time() - start, values


def run_side(side, folder, args, letters):
    words = [sys.executable, __file__, '--side', side, '--folder', folder, '--items', str(args.items), '--batch-size', str(args.batch_size)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'} | ({'PYTHONPATH': args.harness} if side == 'harness' else {})
    done = subprocess.run(words + ['--letters'] * letters, capture_output=True, text=True, env=environment)
    if done.returncode: raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().rsplit('\n', 1)[-1])


def choices_of(values, width=6):
    rows = [values[start:start + width] for start in range(0, len(values), width)]
    return [max(range(width), key=row.__getitem__) for row in rows]


def main(args):
    from kyara.sft import make_student
    with tempfile.TemporaryDirectory() as place:
        texts = [item['prompt'] + ''.join(item['choices']) for letters in (False, True) for item in make_items(40, letters)]
        folder = str(make_student(texts, Path(place) / 'student', **SIZE))
        for letters in (False, True):
            results = {}
            for side in ('ours', 'alone', *(['harness'] if args.harness else [])):
                runs = [run_side(side, folder, args, letters) for _ in range(args.repeats)]
                results[side] = min(seconds for seconds, _ in runs), runs[0][1]
            for side, (seconds, values) in results.items():
                ratio, same = seconds / results['ours'][0], choices_of(values) == choices_of(results['ours'][1])
                note = '' if side == 'alone' else f'same choices: {same}'
                print(f"{'letters' if letters else 'texts':8}{side:8}{args.items / seconds:8.1f} items/s, ours is {ratio:4.1f} times as fast {note}")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--harness', default='', help='folder that holds lm_eval')
    parser.add_argument('--items', type=int, default=12)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=1)
    parser.add_argument('--side', choices=('ours', 'alone', 'harness'))
    parser.add_argument('--folder')
    parser.add_argument('--letters', action='store_true')
    given = parser.parse_args()
    if not given.side: main(given)
    else:
        asked = make_items(given.items, given.letters)
        if given.side == 'harness': result = measure_harness(given.folder, asked, given.batch_size)
        else: result = measure_ours(given.folder, asked, given.batch_size, given.side == 'alone')
        print(json.dumps(result))
