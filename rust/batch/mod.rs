//! Batches on the CPU: the order of an epoch, which examples share a step and a micro-batch, packing, padding.

pub mod order;
pub mod pack;
pub mod pad;
mod place;
pub mod rows;
pub mod schedule;
pub mod share;

/// FNV-1a, 64 bits, of numbers as eight bytes each, little-endian: what the vector files hold.
#[cfg(test)]
fn digest(numbers: &[i64]) -> String {
    let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
    let mixed = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
    format!("{:016x}", bytes.fold(0xCBF2_9CE4_8422_2325, mixed))
}
