"""How well and how fast the citation gate tells true claims from false ones: python tests/bench_cite.py --data ../shared/data/drcd

Claims are made from the paragraphs of DRCD: true ones said otherwise, and the same with a changed number, unit, name or sign, or the
id of another paragraph. One half of the articles was used while the rules were written, the other was not. Speed is one claim an answer,
five documents beside it, documents read for the first time."""
import argparse, random, time
from pathlib import Path

from kyara.align import read_clause, read_evidence, read_statement, segmenter
from kyara.alter import free_cases, half, make_cases, read_paragraphs
from kyara.cite import check_citations, confusion, measure_gate

def speed(cases, texts):
    "Give claims a second: with nothing read before, and with the documents read."
    segmenter().cut('暖機')
    for cache in (read_evidence, read_statement, read_clause): cache.cache_clear()
    rates = []
    for _ in range(2):
        read_statement.cache_clear()
        started = time.process_time()
        for case in cases: check_citations(f'{case.claim}【{case.cited}】。', {name: texts[name] for name in case.documents})
        rates.append(len(cases) / (time.process_time() - started))
    return rates

def wrong_cases(cases, texts, kinds, count):
    "Print cases with the wrong verdict."
    found = []
    for case in cases:
        claims = check_citations(f'{case.claim}【{case.cited}】。', {name: texts[name] for name in case.documents})
        claim = next((claim for claim in claims if claim.verdict != 'supported'), claims[0])
        if (claim.verdict == 'supported') != case.true and (not kinds or case.kind in kinds): found.append((case, claim))
    for case, claim in random.Random(1).sample(found, min(count, len(found))):
        print(f'{case.kind} | {claim.verdict} | {case.claim} | {claim.reason}')

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', type=Path, default=Path('../shared/data/drcd'), help='folder with DRCD_dev.json.gz')
    parser.add_argument('--sentences', type=int, default=3, help='sentences of each paragraph')
    parser.add_argument('--halves', nargs='+', default=['held_out', 'tuned'])
    parser.add_argument('--wrong', type=int, default=0, help='print so many wrong verdicts (of the tuned half only)')
    parser.add_argument('--kinds', nargs='*', default=[])
    arguments = parser.parse_args()
    paragraphs = read_paragraphs(arguments.data / 'DRCD_dev.json.gz')
    for side in arguments.halves:
        chosen = [paragraph for paragraph in paragraphs if half(paragraph.title) == side]
        cases, texts = make_cases(chosen, arguments.sentences), {each.id: f'{each.title}\n{each.text}' for each in chosen}
        cold, warm = speed(cases, texts)
        print(f'\n{side}: {len(chosen)} paragraphs, {len(cases)} claims, {cold:,.0f} claims/s, {warm:,.0f} the second time')
        print(confusion(measure_gate(cases, texts)))
        cases += free_cases(chosen)
        print('\nfree wording\n' + confusion(measure_gate(free_cases(chosen), texts)))
        if arguments.wrong and side == 'tuned': wrong_cases(cases, texts, arguments.kinds, arguments.wrong)

if __name__ == '__main__': main()
