//! How many bytes a task may move before other tasks of its thread have their turn.

use tokio::task::{coop, yield_now};

/// In bytes: one full read of the relay. A worker looks at its timers and at new readiness only
/// between the turns of its tasks: when no task is ready, and at least after each 61 turns
/// (`event_interval` of tokio). So long turns delay the timers of all streams of the worker.
pub(crate) const TURN_BYTES: usize = 64 * 1024;

/// What a task has moved in its present turn. The budget of tokio counts operations, not bytes: a
/// turn may have 128 operations, and one operation on a stream may move 256 KiB.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    moved: usize,
}

impl Turn {
    pub(crate) fn moved(&mut self, bytes: usize) {
        self.moved += bytes;
    }

    /// To be awaited after each operation. After [`TURN_BYTES`], lets all other tasks have their
    /// turns first, and the timers, too.
    pub(crate) async fn go_on(&mut self) {
        if self.moved < TURN_BYTES {
            coop::consume_budget().await;
        } else {
            self.moved = 0;
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn others_have_their_turns_between_the_turns_of_a_bulk_stream() {
        const PIECE: usize = TURN_BYTES / 4;
        const PIECES: usize = 64;
        let moved = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&moved);
        let bulk = tokio::spawn(async move {
            let mut turn = Turn::default();
            for _ in 0..PIECES {
                counted.fetch_add(PIECE, Ordering::Relaxed);
                turn.moved(PIECE);
                turn.go_on().await;
            }
        });
        let mut before = 0;
        while !bulk.is_finished() {
            yield_now().await;
            let now = moved.load(Ordering::Relaxed);
            assert!(now - before <= TURN_BYTES, "{} bytes in one turn", now - before);
            before = now;
        }
        assert_eq!(before, PIECES * PIECE);
    }
}
