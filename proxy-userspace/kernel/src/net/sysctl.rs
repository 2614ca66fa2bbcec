//! A setting below `/proc/sys/net` that is read often.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::host;

/// Keeps the file open, so that a look costs one system call. The open file shows the network
/// namespace of the thread that looked first.
#[derive(Debug)]
pub(crate) struct Sysctl {
    setting: &'static str,
    /// `None`: the kernel did not have the setting at the last look.
    file: ArcSwapOption<File>,
}

impl Sysctl {
    pub(crate) fn new(setting: &'static str) -> Self {
        let sysctl = Self { setting, file: ArcSwapOption::empty() };
        sysctl.open().ok();
        sysctl
    }

    /// The number that the setting has now. `None` if this kernel does not have the setting: the
    /// module may be loaded later, so the next look tries again.
    pub(crate) fn number(&self) -> Option<u64> {
        if let Some(file) = &*self.file.load()
            && let Some(number) = number(file)
        {
            return Some(number);
        }
        // The module may have been unloaded and loaded again. Then the old file cannot be read.
        self.file.store(None);
        number(&*self.open().ok()?)
    }

    fn open(&self) -> io::Result<Arc<File>> {
        let file = Arc::new(File::open(host::path(self.setting))?);
        self.file.store(Some(Arc::clone(&file)));
        Ok(file)
    }
}

fn number(file: &File) -> Option<u64> {
    let mut text = [0; 32];
    let len = file.read_at(&mut text, 0).ok()?;
    str::from_utf8(&text[..len]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_read_again_and_again() {
        let sysctl = Sysctl::new("core/somaxconn");
        assert!(sysctl.number().is_some_and(|number| number > 0));
        assert_eq!(sysctl.number(), sysctl.number());
    }

    #[test]
    fn a_setting_that_the_kernel_does_not_have_is_none() {
        let sysctl = Sysctl::new("core/no_such_setting");
        assert_eq!((sysctl.number(), sysctl.number()), (None, None));
    }
}
