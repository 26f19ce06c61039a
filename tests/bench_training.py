"""Whether training does what it should, and how fast: python tests/bench_training.py

First part, three seeds: a student of two million parameters learns to write digits as Chinese numerals, in three voices mixed (plain, padded with
politeness, curated). (a) exact match on held-out numbers, (b) refinement on the curated voice, (c) SPIN against its own answers, (d) DPO for
plain over padded.
Second part: tokens a second and peak memory beside TRL's defaults, on rows of mixed length, each measured in a process of its own."""
import argparse, json, random, re, statistics, subprocess, sys, time
from pathlib import Path
from tempfile import TemporaryDirectory

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

WAYS = {'TRL as it comes': None, 'TRL, float32, no checkpointing': dict(bf16=False, gradient_checkpointing=False),
        'grouped by length': dict(bf16=False, gradient_checkpointing=False, train_sampling_strategy='group_by_length'),
        'packed, rows apart': dict(bf16=False, gradient_checkpointing=False, packing=True)}

def mixed_rows(count):
    "Write dialogues from a line to a page, as retrieval rows and plain questions are mixed."
    draw = random.Random(0)
    length = lambda: int(min(480, max(6, draw.lognormvariate(3.9, 0.9))))
    texts = [''.join(draw.choices('玉山是臺灣最高的山，主峰海拔公尺。', k=length())) for _ in range(count)]
    say = lambda number, text: [{'role': 'user', 'content': f'第{number}題？'}, {'role': 'assistant', 'content': text}]
    return [{'id': str(number), 'messages': say(number, text)} for number, text in enumerate(texts)]

def measure(way, folder, count):
    "Train one epoch in one way; print tokens a second and peak memory as JSON."
    import resource, torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from kyara.sft import DOCUMENTS, fit_rows, load_model, load_tokenizer, sft_arguments
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder)
    rows, _, longest = fit_rows(mixed_rows(count), tokenizer)
    settings = dict(WAYS[way] or {}, num_train_epochs=1, logging_steps=1000, save_strategy='no', report_to='none', disable_tqdm=True,
                    max_length=longest, assistant_only_loss=True, use_cpu=True, output_dir=f'{folder}/out')
    if settings.get('packing'): settings['per_device_train_batch_size'] = 2 # Two packs hold about as many tokens as eight rows with their padding
    model = load_model(folder, attn_implementation=DOCUMENTS if settings.get('packing') else 'eager')
    trainer = SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=Dataset.from_list([{'messages': row['messages']} for row in rows]),
                         processing_class=tokenizer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    busy, started = time.process_time(), time.perf_counter()
    trainer.train()
    tokens = sum(row['length'] for row in rows)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({'busy': tokens / (time.process_time() - busy), 'wall': tokens / (time.perf_counter() - started),
                      'steps': trainer.state.global_step, 'peak': grown / 1024, 'rows': len(rows), 'longest': longest}))

def speed(count, repeats):
    "Run every way in turn, several times, and print the best of each beside the defaults."
    from kyara.sft import make_student
    with TemporaryDirectory() as folder:
        make_student([turn['content'] for row in mixed_rows(200) for turn in row['messages']], folder + '/model', **SHAPE)
        found = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                command = [sys.executable, __file__, '--measure', way, '--folder', folder + '/model', '--rows', str(count)]
                child = subprocess.run(command, capture_output=True, text=True)
                if child.returncode: sys.exit(child.stderr[-2000:])
                found[way].append(json.loads(child.stdout.splitlines()[-1]))
    plain = max(run['busy'] for run in found['TRL, float32, no checkpointing'])
    first = found['TRL as it comes'][0]
    print(f"\n{first['rows']} rows of mixed length, the longest {first['longest']} tokens, one thread, best of {repeats}")
    print(f'{"":32} {"tokens/CPU s":>13} {"tokens/s":>9} {"beside TRL":>10} {"steps":>6} {"peak MB over start":>19}')
    for way, runs in found.items():
        best = max(run['busy'] for run in runs)
        wall, peak = max(run['wall'] for run in runs), min(run['peak'] for run in runs)
        print(f"{way:32} {best:13,.0f} {wall:9,.0f} {best / plain:10.2f} {runs[0]['steps']:6} {peak:19,.0f}", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=3, help='0: leave the first part out')
    parser.add_argument('--rows', type=int, default=400, help='rows of the second part; 0: leave it out')
    parser.add_argument('--repeats', type=int, default=2)
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    parser.add_argument('--folder', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure: return measure(arguments.measure, arguments.folder, arguments.rows)
    if arguments.seeds:
        import torch
        torch.set_num_threads(1)
        learning(arguments.seeds)
    if arguments.rows: speed(arguments.rows, arguments.repeats)

if __name__ == '__main__': main()
