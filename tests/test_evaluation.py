"What becomes of replies that are no answers, and of hostile ones."
import functools
import json
import random
import re
import time
from collections import Counter

import pytest

from kyara import evaluate
from kyara.core import UserError
from kyara.evaluate import (BENCHMARKS, MATH_HELD_OUT, comparison_table, contaminated_items, evaluate_models, figures, item_slabs, item_texts,
                            paired_difference, read_items, run_generation, script_difference, tokens_per_character)
from kyara.ledger import Ledger
from kyara.llm import Reply
from kyara.score import score_rows

def problem(number, answer='7'):
    return {'id': str(number), 'messages': [{'role': 'user', 'content': f'第{number}題：3加4是多少？'},
                                            {'role': 'assistant', 'content': f'3 + 4 = 7\n答案：{answer}'}]}

def write(path, rows):
    path.write_text('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows), encoding='utf-8')
    return path

class Scripted:
    "A client that says what it was told to say."
    def __init__(self, *replies): self.replies = replies
    def ask(self, prompts, label='', **sampling):
        return [Reply('key', text, reason, error='http 500' if reason == 'error' else None) for text, reason in self.replies]

def test_only_the_models_own_failures_count(tmp_path):
    items, _ = read_items(MATH_HELD_OUT, write(tmp_path/'items.jsonl', [problem(n) for n in range(6)]))
    client = Scripted(('答案：7', 'stop'), ('答案：8', 'stop'), ('3 + 4', 'length'), ('', 'empty'), ('', 'error'), ('答案：7', 'rerouted'))
    transcripts, dropped = run_generation(MATH_HELD_OUT, items, client)
    assert [row['score'] for row in transcripts] == [1.0, 0.0, 0.0, 0.0]
    assert [row['drop_reason'] for row in dropped] == ['reply_error', 'reply_rerouted'] and dropped[0]['evidence'] == 'http 500'
    got = figures([{**row, 'model': 'kyara'} for row in transcripts])['kyara']['math-held-out']
    assert (got['score'], got['n'], got['no_answer'], got['truncated']) == (25, 4, 50, 25)

def test_items_without_gold_or_twice_are_dropped(tmp_path):
    rows = [problem(1), problem(1), {'id': '2', 'messages': [{'role': 'user', 'content': '？'}, {'role': 'assistant', 'content': '不知道'}]}]
    items, dropped = read_items(MATH_HELD_OUT, write(tmp_path/'items.jsonl', rows))
    assert len(items) == 1 and [row['drop_reason'] for row in dropped] == ['duplicate_id', 'no_gold']

def test_every_model_gets_the_same_drawn_items(tmp_path):
    path = write(tmp_path/'items.jsonl', [problem(number) for number in range(50)])
    first, second = ([item['id'] for item in read_items(MATH_HELD_OUT, path, 10, seed)[0]] for seed in (1, 2))
    assert len(first) == 10 and first != second and first == [item['id'] for item in read_items(MATH_HELD_OUT, path, 10, 1)[0]]

@pytest.mark.parametrize('models,benchmarks,word', [
    ({'a': 'offline'}, {'math-heldout': 'x'}, 'math-held-out'), ({'a': 'offline'}, {'truthfulqa': 'x'}, 'log-likelihoods'),
    ({'a': 'nobody'}, {'math-held-out': 'x'}, 'nobody'), ({}, {'math-held-out': 'x'}, 'at least one'),
    ({'a': 'offline'}, {'math-held-out': 'nowhere.jsonl'}, 'does not exist')])
def test_mistakes_are_refused_before_anything_is_asked(tmp_path, models, benchmarks, word):
    with pytest.raises(UserError, match=word): evaluate_models(models, benchmarks, tmp_path/'ledger.sqlite')

def test_local_models_generate_and_measure(tmp_path):
    from kyara.sft import make_student
    texts = [problem(n)['messages'][0]['content'] + '答案：7' for n in range(20)]
    small = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    models = {f'seed {seed}': str(make_student(texts, tmp_path/f'model{seed}', seed=seed, **small)) for seed in (0, 1)}
    turn = lambda role, text: [{'role': role, 'content': text}]
    pairs = [{'id': str(n), 'prompt': turn('user', text), 'chosen': turn('assistant', '答案：7'), 'rejected': turn('assistant', '我不知道')}
             for n, text in enumerate(texts)]
    paths = {'math-held-out': write(tmp_path/'math.jsonl', [problem(n) for n in range(8)]), 'preference-held-out': write(tmp_path/'pairs.jsonl', pairs)}
    run = lambda: evaluate_models(models, paths, tmp_path/'ledger.sqlite', max_tokens=8, batch_size=4)
    transcripts, dropped, cost = run()
    assert len(transcripts) == 2 * (8 + 20) and not dropped and cost == 0 and [*run()[0]] == [*transcripts]
    scores = figures(transcripts)
    assert scores['seed 0']['math-held-out']['truncated'] > 0 and scores['seed 1']['preference-held-out']['n'] == 20
    assert comparison_table(scores).startswith('| benchmark (rule) | n | seed 0 | seed 1 |')
    assert paired_difference(transcripts, 'preference-held-out', 'seed 0', 'seed 1')['n'] == 20

def test_slabs_change_nothing(tmp_path, monkeypatch):
    path = write(tmp_path/'items.jsonl', [problem(n) for n in (*range(7), 1, 5)])
    def run(**size):
        monkeypatch.setattr(evaluate, 'item_slabs', functools.partial(item_slabs, **size))
        transcripts, dropped, _ = evaluate_models({'a': 'offline', 'b': 'offline-careless'}, {'math-held-out': path}, ':memory:')
        return list(transcripts), list(dropped)
    transcripts, dropped = run()
    assert run(size=2) == (transcripts, dropped) and len(transcripts) == 14
    assert Counter((row['model'], row['drop_reason']) for row in dropped) == {('a', 'duplicate_id'): 2, ('b', 'duplicate_id'): 2}

def test_a_broken_item_in_a_later_slab_is_told_before_anything_is_asked(tmp_path, monkeypatch):
    path = write(tmp_path/'items.jsonl', [*(problem(n) for n in range(5)), {'id': '5', 'messages': None}])
    monkeypatch.setattr(evaluate, 'item_slabs', functools.partial(item_slabs, size=2))
    with pytest.raises(UserError, match='not in the form of math-held-out'):
        evaluate_models({'a': 'offline'}, {'math-held-out': path}, tmp_path/'ledger.sqlite')
    with Ledger(tmp_path/'ledger.sqlite') as ledger: assert ledger.stats() == []

def test_items_that_stood_in_training_rows_are_found(tmp_path):
    path = write(tmp_path/'items.jsonl', [problem(1), {**problem(2), 'messages': [{'role': 'user', 'content': '阿嬤種了3排芒果樹，每排7棵，共有幾棵芒果樹？'},
                                                                                  {'role': 'assistant', 'content': '答案：21'}]}])
    turn = {'role': 'user', 'content': '请算算看：阿嬷种了3排芒果树，每排7棵，共有几棵芒果树？'} # In the other script
    rows = write(tmp_path/'rows.jsonl', [{'id': 'r', 'messages': [turn]}])
    assert contaminated_items(item_texts({'math-held-out': str(path)}), [str(rows)]) == {('math-held-out', '2')}

def test_workers_of_a_cluster_grade_as_this_process_does(tmp_path):
    pytest.importorskip('ray', reason='pip install "kyara[ray]"')
    from nodes import environment, ray_nodes
    items, _ = read_items(MATH_HELD_OUT, write(tmp_path/'items.jsonl', [problem(number, str(number)) for number in range(600)]))
    replies = [(f'想了想。\n答案：{number}顆' if number % 3 else '不知道', 'stop') for number in range(600)]
    texts = {('math-held-out', str(number)): f'阿嬤種了{number}排芒果樹，每排7棵，共有幾棵芒果樹？' for number in range(100, 140)}
    row = lambda number: {'id': str(number), 'messages': [{'role': 'user', 'content': f'請算：阿嬤種了{number}排芒果樹，每排7棵，共有幾棵芒果樹？'}]}
    rows = str(write(tmp_path/'rows.jsonl', [row(number) for number in range(130, 2400)]))
    work = lambda: (run_generation(MATH_HELD_OUT, items, Scripted(*replies)), contaminated_items(texts, [rows]))
    here = work()
    with ray_nodes(tmp_path) as nodes, environment(KYARA_ENGINE=json.dumps({'name': 'ray', 'workers': 2, 'address': nodes.address})): there = work()
    assert here == there and len(here[1]) == 10 and 300 < sum(row['score'] for row in here[0][0]) < 500

def test_a_run_in_both_scripts_says_what_the_script_is_worth(tmp_path):
    from kyara.evaluate import script_ablation, script_table
    from kyara.sft import make_student
    texts = [problem(number)['messages'][0]['content'] for number in range(20)]
    student = str(make_student(texts * 5, tmp_path/'model', vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    path = write(tmp_path/'math.jsonl', [problem(number) for number in range(12)])
    paths = dict.fromkeys(('math-held-out', 'math-held-out-simplified'), path)
    transcripts, _, _ = evaluate_models({'student': student}, paths, tmp_path/'ledger.sqlite', max_tokens=4)
    asked = {row['benchmark']: row['messages'][0]['content'] for row in transcripts}
    assert asked['math-held-out'] == '第11題：3加4是多少？' and asked['math-held-out-simplified'] == '第11题：3加4是多少？'
    row, = script_ablation(figures(transcripts), transcripts, (), {'student': student})
    assert row['n'] == 12 and row['low'] <= row['difference'] <= row['high'] and row['tokens_traditional'] < row['tokens_simplified'], row
    assert f"{row['tokens_traditional']:.3f}, {row['tokens_simplified']:.3f}" in script_table([row])
    assert '–' in script_table(script_ablation(figures(transcripts), transcripts)) # A model that is not here

def test_models_are_compared_item_by_item():
    from kyara.evaluate import difference_rows, difference_table
    row = lambda model, number, score: {'benchmark': 'math-held-out', 'item_id': str(number), 'model': model, 'score': score, 'extracted': '7', 'finish_reason': 'stop'}
    rows = [row('甲', number, 0.0) for number in range(30)] + [row('乙', number, float(number < 20)) for number in range(30)]
    got, = difference_rows(figures(rows), rows)
    assert (got['first'], got['second'], got['n']) == ('甲', '乙', 30) and got['low'] > 0 and '**+66.7' in difference_table([got])

def test_a_difference_is_that_of_the_two_figures():
    "Groups and weights count in it as they do in each figure: TMMLU+ averages subjects, Arena-Hard counts a strong verdict three times."
    from kyara.metrics import TMMLUPLUS_GROUPS
    draw, rows = random.Random(0), []
    subjects = [subject for group in TMMLUPLUS_GROUPS.values() for subject in group]
    common = {'benchmark': 'tmmluplus', 'extracted': 'A', 'finish_reason': 'stop'}
    for model, share in (('甲', 0.4), ('乙', 0.6)):
        rows += [{**common, 'model': model, 'item_id': f'{subject}/{number}', 'score': float(draw.random() < share)}
                 for place, subject in enumerate(subjects) for number in range(3 + place % 20)]
    judged = [{'benchmark': 'arena-hard', 'finish_reason': 'stop', 'model': model, 'item_id': f'game1/{number}', 'extracted': verdict, 'score': score}
              for model, every in (('甲', 3), ('乙', 2)) for number in range(60)
              for verdict, score in [('B>>A', 1.0) if number % every == 0 else ('A>B', 0.0)]]
    answers = [{**row, 'item_id': row['item_id'][6:], 'score': None} for row in judged]
    scores = figures(rows + answers, judgements=judged)
    for name, scored in (('tmmluplus', rows), ('arena-hard', judged)):
        got, one, other = paired_difference(scored, name, '甲', '乙'), scores['甲'][name]['score'], scores['乙'][name]['score']
        assert got['difference'] == pytest.approx(other - one, abs=2e-4) and got['low'] < got['difference'] < got['high']
        scored = [row for row in scored if name == 'arena-hard' or row['item_id'].startswith('physics/')] # A part has no macro average
        assert paired_difference(scored, name, '甲', '乙')['n'] == len(scored) // 2

def test_one_model_on_two_scripts(tmp_path):
    row = lambda name, item, score: {'benchmark': name, 'item_id': f'physics/{item}', 'model': 'kyara', 'score': score, 'extracted': 'A', 'finish_reason': 'stop'}
    rows = [row('tmmluplus', number, float(number % 2)) for number in range(40)] + [row('tmmluplus-simplified', number, 1.0) for number in range(40)]
    got = script_difference(rows, 'kyara', 'tmmluplus', 'tmmluplus-simplified')
    assert got['difference'] == 50 and 30 < got['low'] < 50 < got['high'] < 70 and got['n'] == 40
    with pytest.raises(UserError, match='share no item'): script_difference(rows[:40], 'kyara', 'tmmluplus', 'tmmluplus-simplified')
    from kyara.sft import make_student
    texts = ['臺灣最高的山是玉山。'] * 50
    student = str(make_student(texts, tmp_path/'model', vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1))
    assert tokens_per_character(student, texts[:1]) < tokens_per_character(student, ['台湾最高的岭是雪峰。'])

HOSTILE = ['{' * 10**6, '{"a":' * 2 * 10**5, '[' * 10**6, '\\' * 10**6, '9' * 10**6, '"answer": "' * 10**5, '{"answer": [[' + '9' * 10**6,
           '"answer"' + ' ' * 10**6, "'" * 10**6 + '}', '{}' * 5 * 10**5, '[[' + '1' * 10**6, "{'" * 3 * 10**5 + "': 1" * 10**5 + '}', '{"answer": ' + '[' * 10**5 + ']' * 10**5 + '}']

PIECES = ['{', '}', '[', ']', '[[', ']]', '\\\\', '"', "'", '/', ',', ':', ' ', '\n', '9', '-1.5', '1/', '"answer"', '"answer": "', 'reasoning: ', "': 1",
          '\\\\boxed{', '[[A', 'A>>B', '综合得分', '{"solution": {', 'House 1', '答案：', '#### ', '%', '一百萬', '$']

def fuzz(seed, size=10**6):
    "A megabyte of what scorers look for, in runs of one piece or in no order at all."
    draw, parts, length = random.Random(seed), [], 0
    while length < size:
        parts.append(draw.choice(PIECES) * (draw.choice([1, 1, 2, 1000]) if seed % 2 else 1))
        length += len(parts[-1])
    return ''.join(parts)

@pytest.mark.parametrize('text', [*HOSTILE, *map(fuzz, range(4))], ids=lambda text: f'{text[:12]!r}…')
def test_hostile_text_takes_linear_time(text):
    start = time.process_time()
    row = {'generator': 'Llama-3.1', 'solution': {'header': ['House', 'A'], 'rows': [['1', 'b']]}}
    for read in {benchmark.judge.verdict for benchmark in BENCHMARKS.values() if benchmark.judge}: read(text)
    for extract, score in {(benchmark.extract, benchmark.score) for benchmark in BENCHMARKS.values() if not (benchmark.judge or benchmark.choices)}:
        answer = extract(text, row)
        if answer is not None: score(answer, '7')
    for benchmark in ('gsm8k', 'crux'): score_rows(benchmark, [{'id': 1, 'answer': '7', 'output': text}], model='Llama-3.1', partial=True)
    score_rows('gsm8k', [{'id': 1, 'answer': '7', 'output': text}], 'native', partial=True)
    score_rows('mmlu-redux', [{'id': 1, 'choices': ['甲'], 'correct_answer': '甲', 'output': text}], partial=True)
    score_rows('zebra-grid', [{'id': 'lgp-test-2x2-1', 'solution': {'header': ['House', 'A'], 'rows': [['1', 'b']]}, 'output': text}], partial=True)
    score_rows('tmmluplus', [{'id': 1, 'subject': 'physics', 'answer': 'A', 'output': text}], partial=True)
    score_rows('mt-bench', [{'question_id': 1, 'model': 'm', 'judgment': text}], partial=True)
    score_rows('mt-bench', [{'question_id': 1, 'g1_judgment': text, 'g2_judgment': text}], partial=True)
    score_rows('arena-hard', [{'question_id': 1, 'model': 'm', 'games': [{'judgment': text}, {'judgment': text}]}], partial=True)
    names = ['数学计算', '逻辑推理', '基本任务', '中文理解', '综合问答', '文本写作', '角色扮演', '专业能力']
    score_rows('alignbench', [{'id': name, 'category': name, 'judgment': text} for name in names], partial=True)
    score_rows('chinese-reason-bench', [{'id': 1, 'judge_score': 5}, {'id': 2, 'judgment': text}], partial=True)
    assert time.process_time() - start < 300 # Of this process alone: linear readers take up to 4, one quadratic one takes an hour

def test_the_fuzz_would_notice_a_quadratic_reader():
    "The obvious pattern for AlignBench's dictionary is one: sixteen times the text takes far more than sixteen times as long."
    def seconds(size):
        text, start = "{'" * size, time.process_time()
        re.findall(r"'(.*?)': (\d+)", text)
        return time.process_time() - start
    assert seconds(8_000) > 64 * min(seconds(500) for _ in range(20)) # 256 times as many steps
