//! The stream is frozen: digests of masks all over the counter's range, on every instruction set.
//!
//! `tests/vectors/digests.txt` was written by the slow reference and says what is digested. A change of any line is a new
//! stream, never an edit.

use super::{Shape, bits, column, element, span, vectors};
use crate::rng::stream::{Pattern, Site, SiteKey};
use crate::simd::{Engine, Level};
use crate::threads::Run;

const THRESHOLDS: [u32; 6] = [1, 655, 6554, 32_768, 58_982, 65_535];
const SAMPLES: [u64; 4] = [0, (1 << 32) - 1, 1 << 32, (1 << 40) - 1];
const HEADS: [u32; 3] = [0, 1, 1023];
const ROWS: [u32; 4] = [0, 1, 1 << 19, (1 << 20) - 1];
const TILES: [usize; 3] = [0, 1, 8191];
const LENGTHS: [u32; 8] = [1, 2, 31, 32, 33, 1000, (1 << 20) - 1, 1 << 20];

/// FNV-1a, 64 bits.
fn digest(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    let state =
        bytes.fold(0xCBF2_9CE4_8422_2325, |state: u64, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    format!("{state:016x}")
}

fn key(line: &[String]) -> SiteKey {
    let n = |i: usize| line[i].parse().unwrap();
    Site { seed: n(0), step: n(1), branch: n(2), layer: n(3), site: n(4) }.key().unwrap()
}

fn engines() -> impl Iterator<Item = Engine> {
    Level::ALL.into_iter().filter_map(|level| Engine::new(level).ok())
}

fn lines(kind: &str) -> Vec<Vec<String>> {
    vectors("digests.txt").into_iter().filter(|line| line[0] == kind).collect()
}

fn places(pattern: Pattern) -> Vec<(u64, u32, u32)> {
    let rows = if pattern == Pattern::Element { &ROWS[..] } else { &[0] };
    let heads = SAMPLES.into_iter().flat_map(|sample| HEADS.map(|head| (sample, head)));
    heads.flat_map(|(sample, head)| rows.iter().map(move |&row| (sample, head, row))).collect()
}

#[test]
fn grids() {
    let lines = lines("grid");
    assert_eq!(lines.len(), 3 * 31, "the file is short");
    for line in lines {
        let key = key(&line[2..]);
        for engine in engines() {
            let mut found = vec![];
            if line[1] == "span" {
                for (sample, head, _) in places(Pattern::Span) {
                    for (length, t) in LENGTHS.into_iter().flat_map(|length| THRESHOLDS.map(|t| (length, t))) {
                        let dropped = span::dropped(length, t);
                        found.extend([span::start(key.span_draw(sample, head), length, dropped), dropped]);
                    }
                }
            } else {
                let pattern = if line[1] == "element" { Pattern::Element } else { Pattern::Column };
                for (sample, head, row) in places(pattern) {
                    let counters = key.row(pattern, sample, head, row);
                    for (tile, t) in TILES.into_iter().flat_map(|tile| THRESHOLDS.map(|t| (tile, t))) {
                        let mut words = [0; 4];
                        engine.fill(&counters, tile, t as u16, &mut words);
                        found.extend(words);
                    }
                }
            }
            assert_eq!(digest(&found), line[7], "{engine:?} {line:?}");
        }
    }
}

#[test]
fn whole_masks() {
    let lines = lines("whole");
    assert!(lines.len() >= 8, "the file is short");
    for line in lines {
        let key = key(&line[2..]);
        let list = |i: usize| line[i].split(',').map(|n| n.parse().unwrap()).collect::<Vec<u64>>();
        let n = |i: usize| line[i].parse::<usize>().unwrap();
        let samples = list(7);
        let shape = Shape { samples: &samples, heads: n(8), rows: n(9), columns: n(10) };
        let threshold = n(11) as u32;
        for engine in engines() {
            let run = Run { engine, threads: 2, interrupted: &|| false };
            let mut words = vec![0; samples.len() * shape.heads * shape.rows * bits::words(shape.columns)];
            match line[1].as_str() {
                "element" => element(&run, key, shape, threshold, &mut words),
                "column" => column(&run, key, shape, None, threshold, &mut words),
                _ => {
                    let lengths: Vec<u32> = list(12).into_iter().map(|length| length as u32).collect();
                    span(&run, key, shape, &lengths, threshold, &mut words)
                }
            }
            .unwrap();
            assert_eq!(digest(&words), line[13], "{engine:?} {line:?}");
        }
    }
}
