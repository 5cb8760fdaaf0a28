//! Long work: on which instruction set, on how many threads, and how it is stopped.

use crate::error::{Error, Result};
use crate::simd::{Engine, Mode};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Decisions that one piece of work should have: tens of microseconds, far more than handing it out costs.
pub const PIECE: usize = 1 << 17;
/// Fewer pieces than this are done before a sleeping thread has woken up.
const WORTH_WAKING: usize = 4;
/// Fewer bytes than this are copied alone: two threads took 1.0 to 2.6 times as long for them beside torch.
const WORTH_SHARING: usize = 4 << 20;
/// More threads than this are nobody's wish.
const MOST_THREADS: usize = 1024;
/// How often a long call asks whether it should stop.
const WATCH: Duration = Duration::from_millis(50);

/// How a call runs. The result never depends on it.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// The instruction set.
    pub engine: Engine,
    /// The most threads to use, the calling one included.
    pub threads: usize,
    /// Asked on the calling thread between pieces of work, 50 ms apart or more; `true` ends the call with [`Error::Interrupted`].
    pub interrupted: &'a dyn Fn() -> bool,
}

impl Run<'static> {
    /// The fastest engine, as many threads as the process may use, and no way to stop.
    pub fn new() -> Result<Self> {
        Ok(Run { engine: Engine::chosen()?, threads: default_threads(), interrupted: &|| false })
    }
}

/// `RAYON_NUM_THREADS` if it is a number above 0 (of more than 1024 that), else the processors that affinity and control
/// groups leave us, shared with the other ranks of this machine (torchrun's `LOCAL_WORLD_SIZE`). Found once: asking costs
/// more than a small mask.
pub fn default_threads() -> usize {
    static FOUND: OnceLock<usize> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let number = |name| std::env::var(name).ok().and_then(|n| n.parse().ok()).filter(|&n: &usize| n > 0);
        let ours =
            || std::thread::available_parallelism().map_or(1, usize::from) / number("LOCAL_WORLD_SIZE").unwrap_or(1);
        number("RAYON_NUM_THREADS").unwrap_or_else(ours).clamp(1, MOST_THREADS)
    })
}

impl Run<'_> {
    /// This run, without helpers if only few bytes are moved. Copying so little takes no longer than waking somebody, and
    /// beside torch's threads, which wait for work by spinning, a helper first has to get a processor.
    pub(crate) fn worth(&self, bytes: usize) -> Run<'_> {
        Run { threads: if bytes < WORTH_SHARING { 1 } else { self.threads }, ..*self }
    }

    /// Call `work` for each of `count` tasks, in any order, on this thread and on helpers from the pool.
    pub(crate) fn for_each<T: Send>(
        &self,
        tasks: impl Iterator<Item = T> + Send,
        count: usize,
        work: impl Fn(T) + Sync,
    ) -> Result<()> {
        let queue = Mutex::new(tasks.fuse());
        let stopped = AtomicBool::new(false);
        let next = || {
            if stopped.load(Ordering::Relaxed) {
                return None;
            }
            queue.lock().unwrap_or_else(PoisonError::into_inner).next()
        };
        let help = &|| {
            while let Some(task) = next() {
                work(task);
            }
        };
        let lead = || {
            let mut asked = Instant::now();
            while let Some(task) = next() {
                work(task);
                if asked.elapsed() >= WATCH {
                    asked = Instant::now();
                    stopped.store((self.interrupted)(), Ordering::Relaxed);
                }
            }
        };
        let helpers = if count < WORTH_WAKING { 0 } else { self.threads.min(count).saturating_sub(1) };
        let mode = Mode::of_this_thread();
        // The pool is made once, for calls of any size.
        let ready = if helpers == 0 { None } else { pool(self.threads - 1) };
        match ready {
            Some(pool) => pool.threads.in_place_scope(|scope| {
                for lent in pool.lend(helpers) {
                    scope.spawn(move |_| {
                        let _lent = lent;
                        mode.adopt();
                        help();
                    });
                }
                lead();
            }),
            None => lead(),
        }
        if stopped.into_inner() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

struct Pool {
    process: Process,
    helpers: usize,
    threads: ThreadPool,
    idle: AtomicUsize,
}

/// A helper of a pool, idle again once this goes, by a panic too.
struct Lent<'a>(&'a Pool);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.idle.fetch_add(1, Ordering::Relaxed);
    }
}

impl Pool {
    /// Set so many helpers aside, or as many as are idle. A call never queues behind another one: it would wait for the
    /// other's whole mask, and could not be stopped meanwhile.
    fn lend(&self, wanted: usize) -> impl Iterator<Item = Lent<'_>> {
        let lend = |idle: usize| Some(idle - idle.min(wanted));
        let idle = self.idle.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lend).unwrap_or(0);
        (0..idle.min(wanted)).map(|_| Lent(self))
    }
}

static POOL: Mutex<Option<Arc<Pool>>> = Mutex::new(None);

/// A process' number, and how many forks it is away from the first one, as far as those were told of: numbers return.
type Process = (u32, usize);

static FORKS: AtomicUsize = AtomicUsize::new(0);
/// How many threads can be had, as far as it was found out by failing.
static HAD: AtomicUsize = AtomicUsize::new(MOST_THREADS);

/// This process was just forked.
pub fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A pool of at least so many threads, or of as many as there are to be had; `None`: do the work alone.
///
/// Rayon's global pool does not survive a fork. Ours is remade in the child, and its lock is never waited for: if the
/// parent was copied while it held the lock, the child works alone.
fn pool(helpers: usize) -> Option<Arc<Pool>> {
    let mut slot = POOL.try_lock().ok()?;
    let process = (std::process::id(), FORKS.load(Ordering::Relaxed));
    if let Some(inherited) = slot.take_if(|pool| pool.process != process) {
        std::mem::forget(inherited); // its threads do not exist here, so it must not wait for them
    }
    let mut wanted = helpers.min(HAD.load(Ordering::Relaxed));
    // Threads that cannot be had leave the pool that there is, and are not asked for again.
    while wanted > slot.as_ref().map_or(0, |pool| pool.helpers) {
        let name = |index| format!("hiddenkey-{index}");
        if let Ok(threads) = ThreadPoolBuilder::new().num_threads(wanted).thread_name(name).build() {
            *slot = Some(Arc::new(Pool { process, helpers: wanted, threads, idle: AtomicUsize::new(wanted) }));
        } else {
            wanted /= 2;
            HAD.store(wanted, Ordering::Relaxed);
        }
    }
    slot.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let run = Run { threads, ..Run::new().unwrap() };
            let mut seen = vec![0u8; 1000];
            run.for_each(seen.iter_mut(), 1000, |place| *place += 1).unwrap();
            assert!(seen.iter().all(|&count| count == 1));
        }
    }

    #[test]
    fn an_interrupted_call_stops_and_says_so() {
        let run = Run { threads: 2, interrupted: &|| true, ..Run::new().unwrap() };
        let done = AtomicUsize::new(0);
        let outcome = run.for_each(0..100_000, 100_000, |_| {
            std::thread::sleep(Duration::from_millis(1));
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(outcome, Err(Error::Interrupted));
        assert!(done.into_inner() < 1000);
    }

    /// A helper that panics is lent again: more of them panic than the tests' pool has. Other tests borrow from the
    /// same pool, so a call may find nobody; only a lost helper stays away.
    #[test]
    fn a_panic_costs_no_helper() {
        let run = Run { threads: 2, ..Run::new().unwrap() };
        let me = std::thread::current().id();
        let alone = |_: usize| {
            std::thread::sleep(Duration::from_millis(1));
            assert!(std::thread::current().id() == me, "a helper's");
        };
        let (start, mut panics) = (Instant::now(), 0);
        while panics < 16 {
            assert!(start.elapsed() < Duration::from_secs(30), "helpers came {panics} times");
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.for_each(0..20, 20, alone)));
            panics += usize::from(outcome.is_err());
        }
    }

    /// Helpers flush subnormal numbers if and only if the calling thread does.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn helpers_compute_as_their_caller() {
        let run = Run { threads: 2, ..Run::new().unwrap() };
        let halves = || {
            let mut out = [f32::NAN; 4000];
            run.for_each(out.iter_mut(), 4000, |place| *place = std::hint::black_box(1e-39f32) * 0.5).unwrap();
            out.map(f32::to_bits)
        };
        let before = Mode::of_this_thread();
        assert!(halves().iter().all(|&bits| bits != 0));
        Mode::flushing().adopt();
        let flushed = halves();
        before.adopt();
        assert_eq!(flushed, [0; 4000]);
        assert!(halves().iter().all(|&bits| bits != 0));
    }

    /// Two calls at once, one of them long: the short one must not wait for the long one's helpers.
    #[test]
    fn a_call_does_not_wait_for_another() {
        let run = || Run { threads: 3, ..Run::new().unwrap() };
        let (started, released) = (AtomicUsize::new(0), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                run().for_each(0..8, 8, |_| {
                    started.fetch_add(1, Ordering::Relaxed);
                    while !released.load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                })
            });
            while started.load(Ordering::Relaxed) == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(20));
            let mut seen = [0u8; 100];
            run().for_each(seen.iter_mut(), 100, |place| *place += 1).unwrap();
            assert_eq!(seen, [1; 100]);
            released.store(true, Ordering::Relaxed);
        });
    }
}
