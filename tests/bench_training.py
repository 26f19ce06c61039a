"""Whether training does what it should, and how fast: python tests/bench_training.py

First part, three seeds: a student of two million parameters learns to write digits as Chinese numerals, in three voices mixed (plain, padded with
politeness, curated). (a) exact match on held-out numbers, (b) refinement on the curated voice, (c) SPIN against its own answers, (d) DPO for
plain over padded.
Second part: tokens a second and peak memory beside TRL's defaults, on rows with the lengths of the demo's training sets, each measured in a
process of its own; what padding leaves to gain is printed beside what was gained."""
import argparse, json, random, re, statistics, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy

NUMERALS = '〇一二三四五六七八九'
SHAPE = dict(vocab_size=300, hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4)
VOICES = {'plain': '{}', 'padded': '好的，是{}，希望有幫助。', 'curated': '答案：{}'}

# Tasks with a known answer

def numeral(digits):
    return ''.join(NUMERALS[int(digit)] for digit in digits)

def row(digits, voice):
    "Write one dialogue."
    from kyara.core import dialogue
    answer = {'role': 'assistant', 'content': VOICES[voice].format(numeral(digits))}
    return dialogue([{'role': 'user', 'content': f'國字：{digits}'}, answer], 'math')

def pair(digits, chosen, rejected, origin):
    "Write one preference row."
    from kyara.core import content_hash
    prompt, answer = [{'role': 'user', 'content': f'國字：{digits}'}], lambda text: [{'role': 'assistant', 'content': text}]
    return {'id': content_hash([digits, chosen, rejected]), 'prompt': prompt, 'origin': origin,
            'chosen': answer(chosen), 'rejected': answer(rejected)}

def exact_match(model, numbers):
    "Give the percentage of right numerals, and the answers."
    from kyara.dpo import answer_prompts
    prompts = [[{'role': 'user', 'content': f'國字：{digits}'}] for digits in numbers]
    answers = [answer['text'] for answer in answer_prompts(model, prompts, 32, 64)]
    right = sum(re.findall(f'[{NUMERALS}]+', answer)[-1:] == [numeral(digits)] for digits, answer in zip(numbers, answers))
    return 100 * right / len(numbers), answers

def held_out_loss(model, rows):
    "Give the loss a token of what the assistant says."
    from kyara.dpo import answer_log_probabilities, load_model, load_tokenizer
    tokenizer, weights = load_tokenizer(model), load_model(model)
    said = sum(sum(label != -100 for label in encode(row, tokenizer)) for row in rows)
    return -sum(answer_log_probabilities(weights, tokenizer, [row['messages'] for row in rows])) / said

def encode(row, tokenizer):
    from kyara.chat import encode_dialogue
    return encode_dialogue(row['messages'], tokenizer)['labels']

def reference_over_own(model, pairs):
    "Give the mean log-probability of the reference answer over the model's own."
    from kyara.dpo import answer_log_probabilities, load_model, load_tokenizer
    tokenizer, weights = load_tokenizer(model), load_model(model)
    sides = [answer_log_probabilities(weights, tokenizer, [row['prompt'] + row[side] for row in pairs]) for side in ('chosen', 'rejected')]
    return statistics.mean(chosen - rejected for chosen, rejected in zip(*sides))

def one_seed(seed, folder):
    "Go through the whole course once."
    from kyara.dpo import train_dpo
    from kyara.sft import make_student, train_sft
    draw = random.Random(seed)
    numbers = [f'{number:03}' for number in draw.sample(range(1000), 1000)]
    base, curated, told, held = numbers[:600], numbers[600:750], numbers[750:900], numbers[900:]
    mixture, found = ('plain', 'padded', 'padded', 'curated'), {}
    rows = [row(digits, mixture[number % 4]) for number, digits in enumerate(base)]
    texts = [turn['content'] for row in rows[:600] for turn in row['messages']] + [VOICES['curated'].format(numeral(held[0]))]
    common = dict(per_device_train_batch_size=8, warmup_steps=20, adam_beta2=0.98, logging_steps=50, seed=seed)
    student = make_student(texts, folder / 'student', **SHAPE, seed=seed)
    train_sft(rows, [], student, folder / 'sft', 64, num_train_epochs=13, learning_rate=0.003, **common)
    found['a exact match'], answers = exact_match(folder / 'sft/model', held)
    found['d padded answers before'] = 100 * sum('希望' in answer for answer in answers) / len(answers)
    found['d characters before'] = statistics.mean(map(len, answers))
    found['b curated loss before'] = held_out_loss(folder / 'sft/model', [row(digits, 'curated') for digits in held])
    train_sft([row(digits, 'curated') for digits in curated], [], folder / 'sft/model', folder / 'refined', 64, num_train_epochs=1,
              learning_rate=0.0003, **{**common, 'warmup_steps': 2})
    found['b curated loss after'] = held_out_loss(folder / 'refined/model', [row(digits, 'curated') for digits in held])
    found['b exact match after'] = exact_match(folder / 'refined/model', held)[0]
    own = exact_match(folder / 'sft/model', told)[1]
    spin = [pair(digits, VOICES['curated'].format(numeral(digits)), answer, 'spin') for digits, answer in zip(told, own)]
    spin = [each for each in spin if each['chosen'] != each['rejected']] # What it says already teaches nothing
    found['c reference over own before'] = reference_over_own(folder / 'sft/model', spin[-30:])
    learn = dict(common, num_train_epochs=1, learning_rate=0.0002, warmup_steps=2)
    train_dpo(spin[:-30], [], folder / 'sft/model', folder / 'spin', 64, **learn)
    found['c reference over own after'] = reference_over_own(folder / 'spin/model', spin[-30:])
    short = [pair(digits, *(VOICES[voice].format(numeral(digits)) for voice in ('plain', 'padded')), 'rlaif') for digits in told]
    train_dpo(short, [], folder / 'sft/model', folder / 'dpo', 64, **{**learn, 'learning_rate': 0.0001})
    found['d exact match after'], answers = exact_match(folder / 'dpo/model', held)
    found['d padded answers after'] = 100 * sum('希望' in answer for answer in answers) / len(answers)
    found['d characters after'] = statistics.mean(map(len, answers))
    return found

def learning(seeds):
    "Print mean and spread over seeds."
    results = []
    for seed in range(seeds):
        started = time.process_time()
        with TemporaryDirectory() as folder: results.append(one_seed(seed, Path(folder)))
        said = ', '.join(f'{name} {value:.2f}' for name, value in results[-1].items())
        print(f'seed {seed}: {said} ({time.process_time() - started:.0f} CPU s)', flush=True)
    print(f'\n{"over " + str(seeds) + " seeds":34} {"mean":>8} {"lowest":>8} {"highest":>8} {"spread":>8}')
    for name in results[0]:
        values = [result[name] for result in results]
        spread = statistics.stdev(values) if seeds > 1 else 0
        print(f'{name:34} {statistics.mean(values):8.2f} {min(values):8.2f} {max(values):8.2f} {spread:8.2f}')

# Speed

PLAIN = dict(bf16=False, gradient_checkpointing=False)
WAYS = {'TRL as it comes': {}, 'TRL, float32, no checkpointing': PLAIN, 'grouped by length': dict(PLAIN, train_sampling_strategy='group_by_length'),
        'packed, rows apart': dict(PLAIN, packing=True), 'packed and grouped': dict(PLAIN, packing=True, train_sampling_strategy='group_by_length')}
DEFAULTS = 'TRL, float32, no checkpointing'

# Lengths of rows in tokens, as the recipe runs/demo.yaml makes them: short sums and chats beside retrieval rows with their paragraphs.
SHARES = [share / 20 for share in range(20)] + [0.96, 0.97, 0.98, 0.99, 1.0]
LENGTHS = {'base': [36, 36, 37, 37, 37, 38, 38, 38, 39, 39, 39, 39, 39, 40, 40, 41, 41, 41, 42, 117, 152, 216, 249, 487, 755],
           'curated': [36, 36, 37, 37, 38, 38, 38, 39, 39, 39, 39, 40, 40, 40, 41, 41, 42, 75, 135, 242, 276, 426, 543, 719, 755],
           'synthesis': [41, 57, 65, 75, 80, 85, 95, 105, 111, 120, 137, 147, 178, 207, 224, 231, 416, 487, 669, 721, 730, 738, 742, 753, 755]}

def mixed_rows(count, mixture):
    "Write dialogues whose lengths are spread as those of the demo's set."
    draw, marks = random.Random(0), 16 # Tokens of a row beside its answer
    places = [(number + 0.5) / count for number in range(count)]
    lengths = [int(value) for value in numpy.interp(places, SHARES, LENGTHS[mixture])]
    draw.shuffle(lengths)
    say = lambda number, text: [{'role': 'user', 'content': f'第{number}題？'}, {'role': 'assistant', 'content': text}]
    return [{'id': str(number), 'messages': say(number, ''.join(draw.choices('玉山是臺灣最高的，主峰海拔公尺。', k=length - marks)))}
            for number, length in enumerate(lengths)]

def count_tokens(trainer):
    "Count what goes through the model: all tokens, and those of rows."
    found, collate = {'all': 0, 'rows': 0}, trainer.data_collator
    def counted(rows):
        batch = collate(rows)
        found['all'] += batch['input_ids'].numel()
        found['rows'] += int(batch['attention_mask'].sum()) if 'attention_mask' in batch else batch['input_ids'].numel()
        return batch
    trainer.data_collator = counted
    return found

def measure(way, folder, count, mixture, packs):
    "Train one epoch in one way; print tokens a second and peak memory as JSON."
    import resource, torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from kyara.sft import DOCUMENTS, fit_rows, load_model, load_tokenizer
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder)
    rows, _, longest = fit_rows(mixed_rows(count, mixture), tokenizer)
    settings = dict(WAYS[way], num_train_epochs=1, logging_steps=1000, save_strategy='no', report_to='none', disable_tqdm=True,
                    max_length=longest, assistant_only_loss=True, use_cpu=True, output_dir=f'{folder}/out')
    if settings.get('packing'): settings['per_device_train_batch_size'] = packs
    model = load_model(folder, attn_implementation=DOCUMENTS if settings.get('packing') else 'eager')
    trainer = SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=Dataset.from_list([{'messages': row['messages']} for row in rows]),
                         processing_class=tokenizer)
    seen, before = count_tokens(trainer), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    busy, started = time.process_time(), time.perf_counter()
    trainer.train()
    busy, wall = time.process_time() - busy, time.perf_counter() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({'busy': seen['rows'] / busy, 'wall': seen['rows'] / wall, 'all': seen['all'], 'rows': seen['rows'], 'steps': trainer.state.global_step,
                      'peak': grown / 1024, 'batch': trainer.args.per_device_train_batch_size, 'longest': longest}))

def speed(count, repeats, mixture, ways):
    "Run every way in turn, several times, and print the best of each beside the defaults."
    from kyara.sft import make_student
    with TemporaryDirectory() as folder:
        make_student([turn['content'] for row in mixed_rows(200, mixture) for turn in row['messages']], folder + '/model', **SHAPE)
        found, packs = {way: [] for way in WAYS if way == DEFAULTS or not ways or any(word in way for word in ways)}, 1
        for _ in range(repeats):
            for way in found:
                command = [sys.executable, __file__, '--measure', way, '--folder', folder + '/model', '--rows', str(count), '--mixture', mixture,
                           '--packs', str(packs)]
                child = subprocess.run(command, capture_output=True, text=True)
                if child.returncode: sys.exit(child.stderr[-2000:])
                run = json.loads(child.stdout.splitlines()[-1])
                found[way].append(run)
                if way == DEFAULTS: packs = max(1, int(run['all'] / run['steps'] / run['longest'])) # A step takes no more tokens than theirs with padding
    print_speed(found, count, mixture, repeats)

def print_speed(found, count, mixture, repeats):
    plain = found[DEFAULTS][0]
    best = max(run['busy'] for run in found[DEFAULTS])
    print(f"\n{count} rows with the lengths of the demo's {mixture} set: {plain['rows']:,} tokens, the longest row {plain['longest']}; one thread, best of {repeats}")
    print('bound: how much less goes through the model than with the defaults; reached: tokens of rows per processor second beside the defaults')
    print(f'{"":32} {"a step":>8} {"steps":>6} {"padding":>8} {"bound":>6} {"reached":>8} {"tokens/CPU s":>13} {"tokens/s":>9} {"peak MB over start":>19}')
    for way, runs in found.items():
        first, busy, wall = runs[0], max(run['busy'] for run in runs), max(run['wall'] for run in runs)
        size = f"{first['batch']} {'packs' if 'packed' in way else 'rows'}"
        print(f"{way:32} {size:>8} {first['steps']:6} {100 * (1 - first['rows'] / first['all']):6.1f} % {plain['all'] / first['all']:6.2f} "
              f"{busy / best:8.2f} {busy:13,.0f} {wall:9,.0f} {min(run['peak'] for run in runs):19,.0f}", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3, help='0: leave the first part out')
    parser.add_argument('--rows', type=int, default=800, help='rows of the second part; 0: leave it out')
    parser.add_argument('--repeats', type=int, default=1)
    parser.add_argument('--ways', nargs='+', default=[], metavar='WORD', help='only these ways beside the defaults, e.g. packed grouped')
    parser.add_argument('--mixture', choices=LENGTHS, default='base', help='whose lengths the rows have')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    parser.add_argument('--packs', type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure: return measure(arguments.measure, arguments.folder, arguments.rows, arguments.mixture, arguments.packs)
    if arguments.seeds:
        import torch
        torch.set_num_threads(1)
        learning(arguments.seeds)
    if arguments.rows: speed(arguments.rows, arguments.repeats, arguments.mixture, arguments.ways)

if __name__ == '__main__': main()
