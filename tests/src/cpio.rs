//! Archives that the kernel unpacks as its first file system (initramfs; the format `newc` of
//! cpio(5)). A file may hold several archives one after the other. The kernel unpacks them in this
//! order into the same file system.

use std::io::{self, Write};

/// Heads and contents are padded to a multiple of this.
const ALIGNMENT: usize = 4;
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive that is being written. Call [`end`](Self::end) after the last entry.
#[derive(Debug)]
pub struct Archive<W: Write> {
    to: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(to: W) -> Self {
        Self { to, entries: 0 }
    }

    /// Adds a directory. Its parent must be added before. `path` begins without a slash, here and
    /// below.
    ///
    /// # Errors
    /// Errors of writing, here and below.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, DIRECTORY, &[])
    }

    /// Adds a file that may be executed.
    pub fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.entry(path, PROGRAM, content)
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.entry(path, LINK, to.as_bytes())
    }

    /// Ends the archive and returns the writer.
    pub fn end(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::other(format!("{path} is too large for an archive"));
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name = u32::try_from(path.len() + 1).map_err(too_large)?;
        self.entries += 1;
        // Inode, mode, owner, group, links, time, size, four device numbers, length of the name,
        // checksum.
        let numbers = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        let mut head = b"070701".to_vec();
        for number in numbers {
            write!(head, "{number:08x}")?;
        }
        head.extend_from_slice(path.as_bytes());
        head.push(0);
        self.padded(&head)?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        let missing = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        self.to.write_all(&[0; ALIGNMENT][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_form_of_newc() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").unwrap();
        archive.file("bin/a", b"12345").unwrap();
        archive.link("sh", "bin/a").unwrap();
        let bytes = archive.end().unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let heads: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        // A head has 110 bytes. The head with its name, and the content, are padded to multiples of
        // four.
        assert_eq!(heads, [0, 116, 116 + 116 + 8, 116 + 116 + 8 + 116 + 8]);
        assert_eq!(&text[116 + 14..116 + 22], "000081ed");
        assert_eq!(&text[116 + 54..116 + 62], "00000005");
        assert!(text[116 + 110..].starts_with("bin/a\x0012345\x00\x00\x00070701"));
        assert_eq!(bytes.len() % ALIGNMENT, 0);
    }
}
