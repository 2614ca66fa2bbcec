//! Grace periods. The kernel handles each packet inside an RCU reader. So after a grace period,
//! every packet that was on its way through the kernel at the start is done.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

/// Returns when every RCU reader of this moment is done (MEMBARRIER_CMD_GLOBAL, Linux 4.3): about
/// 12 ms with HZ=250.
pub fn wait_for_rcu_readers() {
    // SAFETY: takes two numbers and touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result != 0 {
        // The kernel refuses with nohz_full CPUs, and a seccomp profile may refuse. No softirq
        // takes as long as this sleep.
        #[expect(clippy::disallowed_methods, reason = "membarrier would stop the thread as well")]
        thread::sleep(Duration::from_millis(100));
    }
}

/// Grace periods for many tasks. A thread waits for one grace period at a time, on behalf of all
/// tasks that asked before the period began. The thread ends when this is dropped.
#[derive(Debug)]
pub struct Grace {
    queue: Arc<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    tasks: Vec<oneshot::Sender<()>>,
    stop: bool,
}

impl Grace {
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> io::Result<Arc<Self>> {
        let queue = Arc::new(Queue::default());
        let of_thread = Arc::clone(&queue);
        thread::Builder::new().name("grace".to_owned()).spawn(move || of_thread.serve())?;
        Ok(Arc::new(Self { queue }))
    }

    /// Returns after a grace period that began after this call: 12 to 24 ms with HZ=250.
    pub async fn wait(&self) {
        let (done, waits) = oneshot::channel();
        self.queue.lock().tasks.push(done);
        self.queue.changed.notify_one();
        // The thread lives as long as `self`, so it always answers.
        let answered = waits.await;
        debug_assert!(answered.is_ok());
    }
}

impl Drop for Grace {
    fn drop(&mut self) {
        self.queue.lock().stop = true;
        self.queue.changed.notify_one();
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that runs under the lock panics.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn serve(&self) {
        loop {
            let waiting = self.lock();
            let idle = |waiting: &mut Waiting| waiting.tasks.is_empty() && !waiting.stop;
            let mut waiting = self.changed.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
            if waiting.stop {
                return;
            }
            let tasks = std::mem::take(&mut waiting.tasks);
            drop(waiting);
            wait_for_rcu_readers();
            for task in tasks {
                // A task that was cancelled does not listen any more.
                task.send(()).ok();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn those_who_wait_together_share_grace_periods() {
        let grace = Grace::start().unwrap();
        let begin = Instant::now();
        let waits: Vec<_> = (0..1000)
            .map(|_| {
                let grace = Arc::clone(&grace);
                tokio::spawn(async move { grace.wait().await })
            })
            .collect();
        for wait in waits {
            wait.await.unwrap();
        }
        // One by one it would take 12 seconds.
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn the_thread_ends_with_its_owner_and_survives_cancelled_waits() {
        let grace = Grace::start().unwrap();
        drop(tokio::time::timeout(Duration::ZERO, grace.wait()).await);
        grace.wait().await;
        let queue = Arc::downgrade(&grace.queue);
        drop(grace);
        let deadline = Instant::now() + Duration::from_secs(5);
        while queue.strong_count() > 0 {
            assert!(Instant::now() < deadline, "the thread still runs");
            #[expect(clippy::disallowed_methods, reason = "the test looks at a thread")]
            thread::sleep(Duration::from_millis(5));
        }
    }
}
