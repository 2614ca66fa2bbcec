//! Answers of the kernel that stay right until the network changes.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::hash::Hash;
use std::time::{Duration, Instant};

use super::netlink::NetworkChanges;
use super::pool::Pool;

/// More destinations than clusters have endpoints. A further answer displaces all others.
const MOST: usize = 4096;
/// The kernel does not report changes of the settings in /proc/sys/net, and some of them change
/// routes. So answers are forgotten after this time, too.
const AGE: Duration = Duration::from_secs(5);

/// Answers about the network namespace in which this was made. Threads that ask at the same time
/// have separate memories, and do not wait for each other. All of them must be in that namespace.
///
/// **A remembered answer is as good as one that is asked for now.** The kernel queues the report of
/// a change on every memory's socket before the system call that made the change returns. Each use
/// of a memory first reads that queue, and forgets all answers if there is a report. So an answer
/// can only be outdated by a change that happens after the question. A change that happens after
/// the kernel has answered outdates a new answer just as well.
pub(crate) struct Remembered<K, V>(Pool<Answers<K, V>>);

impl<K, V> fmt::Debug for Remembered<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Remembered")
    }
}

impl<K: Hash + Eq, V: Clone> Remembered<K, V> {
    /// Never fails. Without a descriptor, nothing is remembered.
    pub(crate) fn new() -> Self {
        Self(Pool::of(Answers::new()))
    }

    /// Calls `work` with the answers that are right now.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut Answers<K, V>) -> R) -> R {
        let refreshed = |answers: &mut Answers<K, V>| {
            answers.forget_outdated(Instant::now());
            work(answers)
        };
        let Ok(result) = self.0.with(|| Ok::<_, Infallible>(Answers::new()), refreshed);
        result
    }
}

/// The memory of one thread.
pub(crate) struct Answers<K, V> {
    /// `None`: changes cannot be noticed, so each answer is forgotten before the next use.
    changes: Option<NetworkChanges>,
    known: HashMap<K, V>,
    forget_at: Instant,
}

impl<K: Hash + Eq, V: Clone> Answers<K, V> {
    fn new() -> Self {
        Self { changes: NetworkChanges::new().ok(), known: HashMap::new(), forget_at: Instant::now() }
    }

    fn forget_outdated(&mut self, now: Instant) {
        let changed = self.changes.as_mut().is_none_or(NetworkChanges::any);
        if changed || now >= self.forget_at {
            self.known.clear();
            self.forget_at = now + AGE;
        }
    }

    /// The remembered answer, or what `ask` answers. Errors are not remembered.
    ///
    /// # Errors
    /// The error of `ask`.
    pub(crate) fn get<E>(&mut self, question: K, ask: impl FnOnce(&K) -> Result<V, E>) -> Result<V, E> {
        if let Some(answer) = self.known.get(&question) {
            return Ok(answer.clone());
        }
        let answer = ask(&question)?;
        if self.known.len() >= MOST {
            self.known.clear();
        }
        self.known.insert(question, answer.clone());
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_again_and_errors_are_not() {
        let remembered = Remembered::new();
        let ask = |answer: Result<u32, &'static str>| {
            remembered.with(|answers| answers.get("question", |_| answer))
        };
        assert_eq!(ask(Err("unknown")), Err("unknown"));
        assert_eq!(ask(Ok(1)), Ok(1));
        // Another process may change the network of this machine at any time.
        assert!((0..100).any(|_| ask(Ok(1)) == Ok(1) && ask(Ok(2)) == Ok(1)));
    }

    #[test]
    fn answers_get_old_and_are_not_kept_without_reports_of_changes() {
        let mut answers = Answers::new();
        let now = Instant::now();
        answers.forget_outdated(now);
        answers.known.insert("question", 1);
        answers.forget_outdated(now + AGE);
        assert!(answers.known.is_empty());

        answers.changes = None;
        answers.known.insert("question", 1);
        answers.forget_outdated(now + AGE);
        assert!(answers.known.is_empty());
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut answers = Answers::new();
        for question in 0..=MOST {
            answers.get(question, |_| Ok::<_, ()>(())).unwrap();
        }
        assert!(answers.known.len() <= MOST);
    }
}
