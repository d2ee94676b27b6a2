//! The day that a chat template may print.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// From the weekday of 1970-01-01 on.
const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
/// Greatest year that is printed with four digits.
const MAX_YEAR: u32 = 9999;

/// A day from 1970-01-01 to 9999-12-31. It is read and printed as `2025-01-31`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u32,
    /// From 1.
    month: u32,
    /// From 1.
    day: u32,
}

impl Date {
    /// The day of that year, month and day of the month, if there is one.
    pub fn new(year: u32, month: u32, day: u32) -> Option<Date> {
        let exists = (1970..=MAX_YEAR).contains(&year)
            && (1..=12).contains(&month)
            && (1..=days_of_month(year, month)).contains(&day);
        exists.then_some(Date { year, month, day })
    }

    /// The day it is in Greenwich by the system's clock; 1970-01-01 for a clock that is out of all range.
    pub fn today() -> Date {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        Date::from_days(seconds / SECONDS_PER_DAY)
    }

    /// The day that many days after 1970-01-01.
    fn from_days(mut days: u64) -> Date {
        let first = Date { year: 1970, month: 1, day: 1 };
        let mut date = first;
        loop {
            let length = u64::from(days_of_month(date.year, date.month));
            if days < length {
                return Date { day: days as u32 + 1, ..date };
            }
            days -= length;
            date = match date.month {
                12 if date.year == MAX_YEAR => return first,
                12 => Date { year: date.year + 1, month: 1, day: 1 },
                month => Date { month: month + 1, ..date },
            };
        }
    }

    /// Days since the first day of the year.
    fn day_of_year(self) -> u32 {
        (1..self.month).map(|month| days_of_month(self.year, month)).sum::<u32>() + self.day - 1
    }

    fn weekday(self) -> &'static str {
        let years = (1970..self.year).map(|year| 365 + u32::from(is_leap(year))).sum::<u32>();
        WEEKDAYS[(years + self.day_of_year()) as usize % WEEKDAYS.len()]
    }

    /// This day at midnight as Python's `strftime` prints it. `%-d` and the like leave the zero out.
    ///
    /// # Errors
    /// A directive that is not known, by its spelling.
    pub fn strftime(self, format: &str) -> Result<String, String> {
        let month = MONTHS[self.month as usize - 1];
        let mut out = String::new();
        let mut rest = format;
        while let Some((before, after)) = rest.split_once('%') {
            out.push_str(before);
            let no_padding = after.starts_with('-');
            let directive = after.trim_start_matches('-');
            let Some(letter) = directive.chars().next() else { return Err(format!("%{after}")) };
            let number = |value: u32, width: usize| match no_padding {
                true => value.to_string(),
                false => format!("{value:0width$}"),
            };
            out.push_str(&match letter {
                'Y' => self.year.to_string(),
                'y' => number(self.year % 100, 2),
                'm' => number(self.month, 2),
                'd' => number(self.day, 2),
                'e' => format!("{:2}", self.day),
                'j' => number(self.day_of_year() + 1, 3),
                'B' => month.to_owned(),
                'b' | 'h' => month[..3].to_owned(),
                'A' => self.weekday().to_owned(),
                'a' => self.weekday()[..3].to_owned(),
                'F' => self.to_string(),
                'D' | 'x' => format!("{:02}/{:02}/{:02}", self.month, self.day, self.year % 100),
                'H' | 'M' | 'S' => number(0, 2),
                'I' => "12".to_owned(),
                'p' => "AM".to_owned(),
                'T' | 'X' => "00:00:00".to_owned(),
                'R' => "00:00".to_owned(),
                '%' => "%".to_owned(),
                _ => return Err(format!("%{letter}")),
            });
            rest = &directive[letter.len_utf8()..];
        }
        out.push_str(rest);
        Ok(out)
    }
}

fn is_leap(year: u32) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_month(year: u32, month: u32) -> u32 {
    match month {
        2 => 28 + u32::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

impl FromStr for Date {
    type Err = String;

    fn from_str(text: &str) -> Result<Date, String> {
        let parts: Option<Vec<u32>> = text.split('-').map(|part| part.parse().ok()).collect();
        let date = match parts.as_deref() {
            Some(&[year, month, day]) => Date::new(year, month, day),
            _ => None,
        };
        date.ok_or_else(|| format!("{text:?} is not a day; expected one like 2025-01-31"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn date(text: &str) -> Date {
        text.parse().unwrap()
    }

    #[test]
    fn days_are_counted_as_the_calendar_has_them() {
        for (days, text) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (11_016, "2000-02-29"),
            (19_782, "2024-02-29"),
            (20_088, "2024-12-31"),
        ] {
            assert_eq!(Date::from_days(days), date(text), "{days}");
        }
        assert_eq!(Date::from_days(u64::MAX), date("1970-01-01"));
        assert!(date(&Date::today().to_string()) == Date::today());
    }

    #[test]
    fn days_are_printed_as_python_prints_them() {
        let print = |format: &str| date("2024-07-06").strftime(format).unwrap();
        assert_eq!(print("%d %b %Y"), "06 Jul 2024");
        assert_eq!(print("%A, %B %-d, %y (%a, day %j) 100%%"), "Saturday, July 6, 24 (Sat, day 188) 100%");
        assert_eq!(print("%F|%D|%e|%H:%M:%S|%I%p"), "2024-07-06|07/06/24| 6|00:00:00|12AM");
        assert_eq!(date("2000-03-01").strftime("%a").unwrap(), "Wed");
        assert_eq!(date("2024-07-06").strftime("%Q").unwrap_err(), "%Q");
        assert!(date("2024-07-06").strftime("100%").is_err());
    }

    #[test]
    fn what_is_no_day_is_refused() {
        for text in ["", "2024", "2024-02-30", "2023-02-29", "1969-12-31", "2024-13-01", "2024-00-01", "2024-01-01-01"]
        {
            assert!(text.parse::<Date>().unwrap_err().contains("2025-01-31"), "{text}");
        }
    }
}
