//! The terminal of `top`: raw mode, the alternate screen, key presses.

use std::fs::File;
use std::io::{self, IsTerminal, Write, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use crossterm::{cursor, execute, queue, style, terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, kill_current_process_group};
use rustix::termios::tcgetwinsize;
use signal_hook::consts::SIGCONT;

use super::columns::fit;
use super::stop::Stop;

/// Keys that are no letters, as a terminal in raw mode sends them.
pub const CTRL_C: u8 = 3;
/// See [`CTRL_C`].
pub const CTRL_Z: u8 = 0x1a;
/// See [`CTRL_C`].
pub const ESCAPE: u8 = 0x1b;

/// Reads key presses, level-triggered: input that is not read yet ends the next
/// wait at once. (crossterm's event source is edge-triggered and loses a key
/// that arrives together with a change of the window.)
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

    /// The keys that were pressed, after waiting for the first one for at most
    /// `wait`.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn keys(&self, wait: Duration) -> io::Result<Vec<u8>> {
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
            // The caller checks whether a signal ends the program.
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Between the bytes of one escape sequence, over a slow line.
const SEQUENCE_WAIT: Duration = Duration::from_millis(50);

/// The keys in what a terminal in raw mode sends, without escape sequences
/// (arrows and function keys).
fn parse(typed: &[u8]) -> Vec<u8> {
    let mut keys = Vec::new();
    let mut rest = typed.iter().copied().peekable();
    while let Some(byte) = rest.next() {
        if byte == ESCAPE && rest.next_if(|next| matches!(next, b'[' | b'O')).is_some() {
            // ECMA-48: parameters, then one final byte.
            while rest
                .next()
                .is_some_and(|byte| !(0x40..=0x7e).contains(&byte))
            {}
        } else {
            keys.push(byte);
        }
    }
    keys
}

/// Columns and rows of a terminal that reports none, as serial consoles do.
const USUAL_SIZE: (u16, u16) = (80, 24);

/// Columns and rows.
pub fn size() -> (u16, u16) {
    let reported = tcgetwinsize(stdout()).map_or((0, 0), |size| (size.ws_col, size.ws_row));
    usual_where_zero(reported)
}

fn usual_where_zero((columns, rows): (u16, u16)) -> (u16, u16) {
    let usual = |reported, usual| if reported == 0 { usual } else { reported };
    (usual(columns, USUAL_SIZE.0), usual(rows, USUAL_SIZE.1))
}

/// What is shown: in raw mode on the alternate screen, or `plain`, one refresh
/// below the other without escape sequences. Restores the terminal when dropped.
#[derive(Debug)]
pub struct Screen {
    plain: bool,
    /// The terminal is in raw mode.
    entered: bool,
    /// SIGCONT has come.
    continued: Arc<AtomicBool>,
}

impl Screen {
    /// Sets the terminal up.
    ///
    /// # Errors
    /// Without a terminal.
    pub fn enter(plain: bool) -> anyhow::Result<Self> {
        let continued = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGCONT, Arc::clone(&continued))
            .context("cannot handle SIGCONT")?;
        let mut screen = Self {
            plain,
            entered: false,
            continued,
        };
        screen.set_up()?;
        Ok(screen)
    }

    fn set_up(&mut self) -> anyhow::Result<()> {
        self.continued.store(false, Ordering::Relaxed);
        if !self.plain {
            terminal::enable_raw_mode().context("cannot set up the terminal")?;
            self.entered = true;
            execute!(stdout(), terminal::EnterAlternateScreen, cursor::Hide)?;
        }
        Ok(())
    }

    fn restore(&mut self) {
        if std::mem::take(&mut self.entered) {
            // Nothing better can be done for a terminal that is gone.
            let _ = execute!(stdout(), cursor::Show, terminal::LeaveAlternateScreen);
            let _ = terminal::disable_raw_mode();
        }
    }

    /// Stops the job, as Ctrl-Z does where the terminal handles it, and returns
    /// when it is continued. The kernel ignores SIGTSTP where no shell could
    /// continue the job.
    ///
    /// # Errors
    /// When the terminal cannot be set up again.
    pub fn suspend(&mut self, stop: &Stop) -> anyhow::Result<()> {
        self.restore();
        kill_current_process_group(Signal::TSTP).context("cannot stop the job")?;
        self.resume(stop)
    }

    /// Whether the process was continued after a SIGSTOP: the shell has changed
    /// the terminal meanwhile.
    ///
    /// # Errors
    /// When the terminal cannot be set up again.
    pub fn was_continued(&mut self, stop: &Stop) -> anyhow::Result<bool> {
        let continued = self.continued.load(Ordering::Relaxed);
        if continued {
            self.restore();
            self.resume(stop)?;
        }
        Ok(continued)
    }

    /// Sets up again, unless the program is to end: in the background that
    /// would stop it once more.
    fn resume(&mut self, stop: &Stop) -> anyhow::Result<()> {
        match stop.requested() {
            true => Ok(()),
            false => self.set_up(),
        }
    }

    /// Shows the lines, as many and as much of them as fit.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn show(&self, lines: &[String], size: (u16, u16)) -> io::Result<()> {
        let mut out = stdout().lock();
        match self.plain {
            true => print(&mut out, lines, size)?,
            false => draw(&mut out, lines, size)?,
        }
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Every line at its place. Nothing here can make the terminal scroll.
fn draw(out: &mut impl Write, lines: &[String], (columns, rows): (u16, u16)) -> io::Result<()> {
    queue!(out, terminal::BeginSynchronizedUpdate)?;
    for row in 0..rows {
        let line = lines.get(usize::from(row)).map_or("", String::as_str);
        // Cleared first: after a line that fills its row, some terminals
        // would clear its last character.
        queue!(
            out,
            cursor::MoveTo(0, row),
            terminal::Clear(terminal::ClearType::UntilNewLine),
            style::Print(fit(line, usize::from(columns))),
        )?;
    }
    queue!(out, terminal::EndSynchronizedUpdate)
}

fn print(out: &mut impl Write, lines: &[String], (columns, rows): (u16, u16)) -> io::Result<()> {
    // The empty line is one of the rows.
    for line in lines.iter().take(usize::from(rows - 1)) {
        writeln!(out, "{}", fit(line, usize::from(columns)))?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_keys_and_sequences_are_none() {
        assert_eq!(parse(b"p\t \x03"), b"p\t \x03");
        assert_eq!(parse(b"\x1b"), [ESCAPE]);
        // Up, F1, Shift-Right and a letter after them.
        assert_eq!(parse(b"\x1b[A\x1bOP\x1b[1;2Cr"), b"r");
    }

    #[test]
    fn a_terminal_without_a_size_has_the_usual_one() {
        for (reported, size) in [
            ((0, 0), (80, 24)),
            ((0, 50), (80, 50)),
            ((132, 0), (132, 24)),
            ((1, 1), (1, 1)),
        ] {
            assert_eq!(usual_where_zero(reported), size);
        }
    }

    #[test]
    fn drawing_stays_within_the_window() {
        let lines: Vec<String> = (0..9).map(|n| format!("{n} 日本語")).collect();
        for rows in [1, 2, 3, 4, 9, 20] {
            let mut out = Vec::new();
            draw(&mut out, &lines, (5, rows)).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(!text.contains(['\n', '\r']), "{text:?}");
            // One-based; the last row is cleared even when nothing is in it.
            assert!(text.contains(&format!("\x1b[{rows};1H")), "{text:?}");
            assert!(!text.contains(&format!("\x1b[{};1H", rows + 1)), "{text:?}");
            assert!(text.contains("0 日") && !text.contains("日本"), "{text:?}");
        }
    }

    #[test]
    fn a_plain_refresh_is_lines_alone() {
        let lines = ["title".to_owned(), "日本語".to_owned(), "last".to_owned()];
        for (rows, expected) in [
            (24, "title\n日本\nlast\n\n"),
            (3, "title\n日本\n\n"),
            (1, "\n"),
        ] {
            let mut out = Vec::new();
            print(&mut out, &lines, (5, rows)).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_not_read_yet_ends_the_next_wait() {
        let (ours, mut theirs) = io::pipe().unwrap();
        let keyboard = Keyboard(ours.into());
        assert!(keyboard.keys(Duration::ZERO).unwrap().is_empty());
        theirs.write_all(&[b'x'; 65]).unwrap();
        let long = Duration::from_secs(60);
        assert_eq!(keyboard.keys(long).unwrap().len(), 64);
        assert_eq!(keyboard.keys(long).unwrap(), b"x");
        drop(theirs);
        let gone = keyboard.keys(long).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }
}
