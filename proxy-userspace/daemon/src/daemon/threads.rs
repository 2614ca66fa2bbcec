//! The threads of the workers.

use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

/// Threads, each with the tasks of its own runtime.
pub(super) struct Threads {
    threads: Vec<Thread>,
}

struct Thread {
    runtime: Handle,
    /// Dropping this ends the thread.
    stop: oneshot::Sender<()>,
    /// When this is disconnected, the thread has ended.
    ended: Receiver<()>,
}

/// A runtime that runs on one thread.
pub(super) fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("cannot start a runtime")
}

impl Threads {
    pub(super) fn start(count: usize) -> anyhow::Result<Self> {
        let threads = (0..count).map(Thread::start).collect::<anyhow::Result<_>>()?;
        Ok(Self { threads })
    }

    pub(super) fn runtimes(&self) -> Vec<Handle> {
        self.threads.iter().map(|thread| thread.runtime.clone()).collect()
    }

    /// Drops the tasks of all threads, and waits until they are dropped, at most for `timeout`.
    pub(super) fn end(self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        let stop = |Thread { stop, ended, .. }| {
            drop(stop);
            ended
        };
        let stopping: Vec<_> = self.threads.into_iter().map(stop).collect();
        for ended in stopping {
            // The thread sends nothing: its end closes the channel. A thread that takes longer than
            // the timeout is not waited for.
            ended.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok();
        }
    }
}

impl Thread {
    fn start(number: usize) -> anyhow::Result<Self> {
        let runtime = runtime()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let (ending, ended) = mpsc::channel::<()>();
        let run = move || {
            let _ending = ending;
            // Nothing is sent: dropping the sender ends the wait.
            runtime.block_on(stopped).ok();
            drop(runtime);
        };
        thread::Builder::new()
            .name(format!("worker-{number}"))
            .spawn(run)
            .context("cannot start a thread")?;
        Ok(Self { runtime: handle, stop, ended })
    }
}
