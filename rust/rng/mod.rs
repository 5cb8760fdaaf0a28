//! Random bits: the generator (`philox`) and the meaning of its counter (`stream`).

pub mod philox;
pub mod stream;
