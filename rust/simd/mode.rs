//! How a thread computes with floating-point numbers: rounding, and whether subnormal ones count as 0.
//!
//! `torch.set_flush_denormal` changes that for the calling thread alone. Helpers take it over, so that no result depends on
//! which thread a piece of work went to.

/// A thread's control word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mode(u64);

impl Mode {
    /// That of the calling thread.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn of_this_thread() -> Self {
        let mut word = 0u32;
        // SAFETY: every x86-64 processor has SSE; its control word goes to memory that is ours.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack, preserves_flags)) };
        Mode(u64::from(word & !STICKY))
    }

    /// Let the calling thread compute like this.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn adopt(self) {
        let word = self.0 as u32;
        // SAFETY: the word was read from this register, so no reserved bit of it is set; it is the mode that the caller's
        // code ran under already.
        unsafe {
            std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack, readonly));
        }
    }

    /// That of the calling thread.
    #[cfg(target_arch = "aarch64")]
    pub(crate) fn of_this_thread() -> Self {
        let word: u64;
        // SAFETY: reads a register that every program may read.
        unsafe { std::arch::asm!("mrs {}, fpcr", out(reg) word, options(nomem, nostack, preserves_flags)) };
        Mode(word)
    }

    /// Let the calling thread compute like this.
    #[cfg(target_arch = "aarch64")]
    pub(crate) fn adopt(self) {
        // SAFETY: the word was read from this register.
        unsafe { std::arch::asm!("msr fpcr, {}", in(reg) self.0, options(nomem, nostack, preserves_flags)) };
    }

    /// That of the calling thread, which is not known here.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn of_this_thread() -> Self {
        Mode(0)
    }

    /// Nothing, where modes are not known.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub(crate) fn adopt(self) {}
}

/// The bits that say what has happened, not what is to happen.
#[cfg(target_arch = "x86_64")]
const STICKY: u32 = 0x3F;

#[cfg(all(test, target_arch = "x86_64"))]
impl Mode {
    /// The calling thread's, with subnormal numbers read and written as 0.
    pub(crate) fn flushing() -> Self {
        Mode(Self::of_this_thread().0 | 0x8040)
    }
}
