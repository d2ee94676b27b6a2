//! What this process takes of the machine's memory, and what is free.

/// Reads a line such as `VmHWM:  1234 kB` of a file under /proc, in bytes.
fn proc_bytes(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kilobytes: u64 = line.trim_start_matches(':').trim().trim_end_matches(" kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Bytes resident now, where the system tells.
pub fn resident() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmRSS")
}

/// The most bytes that have been resident, where the system tells.
pub fn peak_resident() -> Option<u64> {
    proc_bytes("/proc/self/status", "VmHWM").or_else(peak_from_usage)
}

#[cfg(unix)]
fn peak_from_usage() -> Option<u64> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is valid, and a zeroed rusage is a valid value.
    let usage = unsafe {
        if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
            return None;
        }
        usage.assume_init()
    };
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    Some(usage.ru_maxrss as u64 * unit)
}

#[cfg(not(unix))]
fn peak_from_usage() -> Option<u64> {
    None
}

/// Bytes that programs can still take without swapping, where the system tells.
pub fn available() -> Option<u64> {
    proc_bytes("/proc/meminfo", "MemAvailable")
}

/// Bytes as people read them.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1e3, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1e3;
        unit += 1;
    }
    if value < 10.0 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let texts = [0, 999, 1000, 9_949, 12_345, 999_499, 999_500, 5_350_000_000].map(human);
        assert_eq!(texts, ["0 B", "999 B", "1.0 kB", "9.9 kB", "12 kB", "999 kB", "1.0 MB", "5.3 GB"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_knows_its_own_size() {
        let (now, peak) = (resident().unwrap(), peak_resident().unwrap());
        assert!(now > 1 << 20 && peak >= now);
        assert!(available().unwrap() > 0);
    }
}
