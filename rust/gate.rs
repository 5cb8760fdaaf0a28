//! Help with a call's work that the call never waits for in vain: whoever has not begun when it is done no longer begins.
//!
//! A thread that is woken may not run for milliseconds: other libraries' threads (OpenMP's) spin for that long after
//! their own work. A scope would wait for it to come and find nothing left to do.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Work that other threads may join while its call lasts.
pub(crate) struct Gate {
    state: Mutex<State>,
    left: Condvar,
    work: *const (dyn Fn() + Sync),
}

struct State {
    open: bool,
    inside: usize,
    panic: Option<Box<dyn Any + Send>>,
}

// SAFETY: all but `work` is both by itself, and what `work` points to may be called from any thread (it is Sync) for as long
// as `Gate::help` does so: see there.
#[allow(unsafe_code)]
unsafe impl Send for Gate {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Gate {}

impl Gate {
    /// Run `lead` here, while whoever `invite` hands the gate to may run `help`. When this returns, nobody runs `help`, and
    /// nobody will. A panic of either comes out here.
    pub fn open<'a>(help: &'a (dyn Fn() + Sync + 'a), invite: impl FnOnce(&Arc<Gate>), lead: impl FnOnce()) {
        let work: *const (dyn Fn() + Sync + 'a) = help;
        // SAFETY: only the lifetime is forgotten; `Gate::help` keeps to it.
        #[allow(unsafe_code)]
        let work =
            unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + 'a), *const (dyn Fn() + Sync + 'static)>(work) };
        let state = Mutex::new(State { open: true, inside: 0, panic: None });
        let gate = Arc::new(Gate { state, left: Condvar::new(), work });
        let closing = Closing(&gate);
        invite(&gate);
        lead();
        drop(closing);
        let panic = gate.lock().panic.take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Run the work, unless its call is over.
    pub fn help(&self) {
        let mut state = self.lock();
        if !state.open {
            return;
        }
        state.inside += 1;
        drop(state);
        // SAFETY: `Gate::open` does not return, nor does a panic leave it, before the gate is closed and all who were let in
        // have left: `Closing` sees to that. We are inside, so what it borrowed is still there.
        #[allow(unsafe_code)]
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.work)() }));
        let mut state = self.lock();
        state.inside -= 1;
        state.panic = outcome.err().or(state.panic.take());
        self.left.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the gate and waits for those inside, whichever way the call ends.
struct Closing<'a>(&'a Gate);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.open = false;
        while state.inside > 0 {
            state = self.0.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn who_comes_late_does_nothing() {
        let (calls, mut kept) = (AtomicUsize::new(0), None);
        let help = || {
            calls.fetch_add(1, Ordering::Relaxed);
        };
        Gate::open(&help, |gate| kept = Some(Arc::clone(gate)), || {});
        kept.unwrap().help();
        assert_eq!(calls.into_inner(), 0);
    }

    #[test]
    fn who_is_inside_is_waited_for() {
        for panics in [false, true] {
            let (begun, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let help = || {
                begun.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(30));
                done.fetch_add(1, Ordering::SeqCst);
            };
            let invite = |gate: &Arc<Gate>| {
                for _ in 0..3 {
                    let gate = Arc::clone(gate);
                    std::thread::spawn(move || gate.help());
                }
            };
            let lead = || {
                while begun.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
                assert!(!panics, "the leader gives up");
            };
            let outcome = catch_unwind(AssertUnwindSafe(|| Gate::open(&help, invite, lead)));
            assert_eq!((outcome.is_err(), done.into_inner()), (panics, 3));
        }
    }

    #[test]
    fn a_helpers_panic_comes_out() {
        let begun = AtomicUsize::new(0);
        let help = || {
            begun.fetch_add(1, Ordering::SeqCst);
            panic!("the helper gives up");
        };
        let invite = |gate: &Arc<Gate>| {
            let gate = Arc::clone(gate);
            std::thread::spawn(move || gate.help());
        };
        let lead = || {
            while begun.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| Gate::open(&help, invite, lead)));
        assert_eq!(outcome.unwrap_err().downcast_ref::<&str>(), Some(&"the helper gives up"));
    }
}
