//! The raw stream for batteries of tests: `cargo run --release --example raw -- [SEED [BYTES]] | RNG_test stdin32`.
//!
//! Writes the 16-bit lanes that masks compare with their thresholds, little-endian, in the order of the columns, and visits
//! the counters as training does: small numbers that change one at a time. What a battery must not see is that
//! neighbouring rows, heads, samples, branches, layers and steps differ in a bit or two. `benches/results/batteries.md` has
//! the verdicts.

use hiddenkey_rs::rng::philox::philox4x32;
use hiddenkey_rs::rng::stream::{Pattern, Site};
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

/// Columns of a row: one tile of 16 counters, so that most of what follows one another lies in different rows.
const COLUMNS: usize = 128;
const ROWS: u64 = 64;
const HEADS: u64 = 12;
const SAMPLES: u64 = 8;
const BRANCHES: u64 = 2;
const LAYERS: u64 = 24;
const SITES: u64 = 2;

/// One row's lanes: column c is half c mod 2 of word (c mod 128) / 32 of block (c mod 32) / 2.
fn row(key: [u32; 2], c0: u32, c2: u32, c3: u32, out: &mut Vec<u8>) {
    let blocks: [[u32; 4]; 16] = std::array::from_fn(|block| philox4x32([c0, block as u32, c2, c3], key));
    for column in (0..COLUMNS).step_by(2) {
        out.extend_from_slice(&blocks[column % 32 / 2][column / 32].to_le_bytes());
    }
}

/// Write at most `bytes`, step after step.
fn write(seed: u64, mut bytes: u64, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = Vec::new();
    for index in 0.. {
        let (site, layer, branch) = (index % SITES, index / SITES % LAYERS, index / SITES / LAYERS % BRANCHES);
        let step = index / SITES / LAYERS / BRANCHES;
        let key = Site { seed, step, branch, layer, site }.key().map_err(io::Error::other)?.0;
        for place in 0..SAMPLES * HEADS {
            let (sample, head) = (SAMPLES * step + place / HEADS, (place % HEADS) as u32);
            buffer.clear();
            for position in 0..ROWS {
                row(key, position as u32 | head << 20, sample as u32, (Pattern::Element as u32) << 30, &mut buffer);
            }
            let part = &buffer[..buffer.len().min(usize::try_from(bytes).unwrap_or(usize::MAX))];
            to.write_all(part)?;
            bytes -= part.len() as u64;
            if bytes == 0 {
                return to.flush();
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let numbers: Result<Vec<u64>, _> = std::env::args().skip(1).map(|text| text.parse()).collect();
    let (seed, bytes) = match numbers.as_deref() {
        Ok([]) => (42, u64::MAX),
        Ok([seed]) => (*seed, u64::MAX),
        Ok([seed, bytes]) => (*seed, *bytes),
        _ => {
            eprintln!("raw: the arguments are a seed and a number of bytes");
            return ExitCode::from(2);
        }
    };
    match write(seed, bytes, &mut io::stdout().lock()) {
        // Whoever reads has had enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            eprintln!("raw: {error}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}
