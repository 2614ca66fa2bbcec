//! A value that one thread at a time may use, such as a socket for requests.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The value that no thread uses now. The lock is held only to take the value out and to put it
/// back, never during a system call. So threads that ask the kernel at the same time do not wait
/// for each other: a thread that finds no value makes one. One value is kept, so that a process at
/// rest holds the same number of descriptors whatever has happened before.
pub(crate) struct Pool<T>(Mutex<Option<T>>);

impl<T> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Pool<T> {
    pub(crate) fn of(first: T) -> Self {
        Self(Mutex::new(Some(first)))
    }

    /// Calls `work` with a value that no other thread has. `make` makes one if there is none. If
    /// `work` panics, its value is dropped.
    ///
    /// # Errors
    /// The error of `make`.
    pub(crate) fn with<R, E>(
        &self,
        make: impl FnOnce() -> Result<T, E>,
        work: impl FnOnce(&mut T) -> R,
    ) -> Result<R, E> {
        let idle = self.lock().take();
        let mut value = match idle {
            Some(value) => value,
            None => make()?,
        };
        let result = work(&mut value);
        // The other value, if there is one, is dropped after the lock.
        let _other = self.lock().replace(value);
        Ok(result)
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_used_again_and_never_by_two_at_once() {
        let pool = Pool::default();
        let with = |make: u32, work: &dyn Fn(u32)| {
            pool.with(|| Ok::<_, ()>(make), |value| work(*value)).unwrap();
        };
        with(1, &|outer| {
            assert_eq!(outer, 1);
            with(2, &|inner| assert_eq!(inner, 2));
        });
        with(3, &|value| assert!(value < 3));
        assert_eq!(pool.with(|| Err("is not called"), |value| *value < 3), Ok(true));
        assert_eq!(Pool::<u32>::default().with(|| Err("no descriptor"), |_| ()), Err("no descriptor"));
    }
}
