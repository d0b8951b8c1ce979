//! The terminal of `top`: raw mode, the alternate screen, key presses.

use std::fs::File;
use std::io::{self, IsTerminal, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use anyhow::Context as _;
use crossterm::{cursor, execute, terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A key that means something to a tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A printable ASCII character.
    Char(char),
    /// Tab.
    Tab,
    /// Escape or Ctrl-C.
    End,
}

/// Reads key presses. Level-triggered: whatever is not read yet ends the next
/// wait at once, however it came. (crossterm's event source is edge-triggered
/// and lost the key that arrived together with a change of the window.)
#[derive(Debug)]
pub struct Keyboard(OwnedFd);

impl Keyboard {
    /// The terminal on stdin, else the controlling one.
    ///
    /// # Errors
    /// Without either.
    pub fn open() -> io::Result<Self> {
        let stdin = stdin();
        Ok(Self(if stdin.is_terminal() {
            stdin.as_fd().try_clone_to_owned()?
        } else {
            File::open("/dev/tty")?.into()
        }))
    }

    /// The keys that were pressed, waiting for the first one so long.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn keys(&self, wait: Duration) -> io::Result<Vec<Key>> {
        let mut typed = [0; 64];
        if !self.readable(wait)? {
            return Ok(Vec::new());
        }
        let mut length = rustix::io::read(&self.0, &mut typed)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // The rest of an arrow's sequence may be a packet behind.
        if typed[length - 1] == ESCAPE && length < typed.len() && self.readable(SEQUENCE_WAIT)? {
            length += rustix::io::read(&self.0, &mut typed[length..])?;
        }
        Ok(parse(&typed[..length]))
    }

    fn readable(&self, wait: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(wait).map_err(io::Error::other)?;
        let mut waited = [PollFd::new(&self.0, PollFlags::IN)];
        match poll(&mut waited, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            // The signal that ends us, say: the caller looks.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

const CTRL_C: u8 = 3;
const ESCAPE: u8 = 0x1b;

/// Between the bytes of one escape sequence, over a slow line.
const SEQUENCE_WAIT: Duration = Duration::from_millis(50);

/// What a terminal in raw mode sends → keys. Arrows and their like, escape
/// sequences, mean nothing here.
fn parse(typed: &[u8]) -> Vec<Key> {
    let mut keys = Vec::new();
    let mut rest = typed.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            CTRL_C => keys.push(Key::End),
            ESCAPE => match rest.next_if(|next| matches!(next, b'[' | b'O')) {
                // ECMA-48: parameters, then one final byte.
                Some(_) => {
                    while rest
                        .next()
                        .is_some_and(|byte| !(0x40..=0x7e).contains(&byte))
                    {}
                }
                None => keys.push(Key::End),
            },
            b'\t' => keys.push(Key::Tab),
            b' '..=b'~' => keys.push(Key::Char(byte.into())),
            _ => {}
        }
    }
    keys
}

/// Columns and rows; a common size where the terminal does not say.
pub fn size() -> (u16, u16) {
    terminal::size().unwrap_or((80, 24))
}

/// Raw mode and the alternate screen, left again however the program ends.
#[derive(Debug)]
pub struct Screen;

impl Screen {
    /// Enters.
    ///
    /// # Errors
    /// Without a terminal.
    pub fn enter() -> anyhow::Result<Self> {
        terminal::enable_raw_mode().context("cannot set up the terminal")?;
        let screen = Self;
        execute!(stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing better can be done for a terminal that is gone.
        let _ = execute!(stdout(), cursor::Show, terminal::LeaveAlternateScreen);
        let _ = terminal::disable_raw_mode();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn bytes_are_keys_and_sequences_are_none() {
        let keys = [Key::Char('p'), Key::Tab, Key::Char(' '), Key::End];
        assert_eq!(parse(b"p\t \x03"), keys);
        assert_eq!(parse(b"\x1b"), [Key::End]);
        // Up, F1, Shift-Right and a letter after them.
        assert_eq!(parse(b"\x1b[A\x1bOP\x1b[1;2Cr"), [Key::Char('r')]);
        assert_eq!(parse("ö\r\n".as_bytes()), []);
    }

    #[test]
    fn what_is_not_read_yet_ends_the_next_wait() {
        let (ours, mut theirs) = io::pipe().unwrap();
        let keyboard = Keyboard(ours.into());
        assert_eq!(keyboard.keys(Duration::ZERO).unwrap(), []);
        theirs.write_all(&[b'x'; 65]).unwrap();
        let long = Duration::from_secs(60);
        assert_eq!(keyboard.keys(long).unwrap().len(), 64);
        assert_eq!(keyboard.keys(long).unwrap(), [Key::Char('x')]);
        drop(theirs);
        let gone = keyboard.keys(long).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }
}
