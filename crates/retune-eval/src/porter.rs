//! The stemmer of ROUGE: Porter's algorithm ("An algorithm for suffix stripping", Program 14.3, 1980) as NLTK extends it.
//!
//! Its departures from the paper: a list of irregular words; words of one or two letters are left alone; *-ies* and *-ied* after one letter
//! keep their e (dies, died); *-y* becomes *-i* only after a consonant that is not the first letter (happi, but enjoy); *-bli* stands for
//! *-abli*, *-fulli* becomes *-ful*, *-alli* is taken back to *-al* before the second step, and *-logi* becomes *-log* with the l counted to the stem;
//! a stem of a vowel and a consonant counts as a short one.

/// Words that no rule gets right, and their stems.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("inning", "inning"),
    ("innings", "inning"),
    ("outing", "outing"),
    ("outings", "outing"),
    ("canning", "canning"),
    ("cannings", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// A suffix, and what takes its place.
type Rule = (&'static str, &'static str);

const PLURALS: [Rule; 4] = [("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")];

const SECOND: [Rule; 22] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
    ("logi", "log"),
];

const THIRD: [Rule; 7] =
    [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")];

const FOURTH: [Rule; 19] = [
    ("al", ""),
    ("ance", ""),
    ("ence", ""),
    ("er", ""),
    ("ic", ""),
    ("able", ""),
    ("ible", ""),
    ("ant", ""),
    ("ement", ""),
    ("ment", ""),
    ("ent", ""),
    ("ion", ""),
    ("ou", ""),
    ("ism", ""),
    ("ate", ""),
    ("iti", ""),
    ("ous", ""),
    ("ive", ""),
    ("ize", ""),
];

/// The stem of a word in lower case.
pub(crate) fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(irregular, _)| *irregular == word) {
        return (*stem).to_owned();
    }
    let mut word = word.to_owned();
    if word.len() <= 2 {
        return word;
    }
    plural(&mut word);
    past(&mut word);
    final_y(&mut word);
    if word.strip_suffix("alli").is_some_and(|stem| measure(stem) > 0) {
        word.truncate(word.len() - "li".len());
    }
    replace(&mut word, &SECOND, |stem, suffix, word| match suffix {
        "logi" => measure(&word[..word.len() - "ogi".len()]) > 0,
        _ => measure(stem) > 0,
    });
    replace(&mut word, &THIRD, |stem, _, _| measure(stem) > 0);
    replace(&mut word, &FOURTH, |stem, suffix, _| measure(stem) > 1 && (suffix != "ion" || stem.ends_with(['s', 't'])));
    final_e(&mut word);
    word
}

/// For each letter whether it is a consonant: a, e, i, o, u are none, nor is a y after one.
fn consonants(word: &str) -> Vec<bool> {
    let mut last = false;
    let is_consonant = |letter: u8| {
        last = match letter {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => !last,
            _ => true,
        };
        last
    };
    word.bytes().map(is_consonant).collect()
}

/// How often a vowel is followed by a consonant.
fn measure(stem: &str) -> usize {
    consonants(stem).windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

fn has_vowel(stem: &str) -> bool {
    consonants(stem).contains(&false)
}

/// Whether it ends with consonant, vowel and a consonant that is not w, x or y, or is a vowel and a consonant.
fn is_short(stem: &str) -> bool {
    match *consonants(stem) {
        [.., true, false, true] => !stem.ends_with(['w', 'x', 'y']),
        [false, true] => true,
        _ => false,
    }
}

fn ends_in_double_consonant(stem: &str) -> bool {
    let [.., a, b] = stem.as_bytes() else { return false };
    a == b && consonants(stem).last() == Some(&true)
}

/// Applies the first rule whose suffix the word has, if the condition, told the stem, the suffix and the word, allows it.
fn replace(word: &mut String, rules: &[Rule], allows: impl Fn(&str, &str, &str) -> bool) {
    let found = rules.iter().find_map(|(suffix, new)| Some((word.strip_suffix(suffix)?, suffix, new)));
    if let Some((stem, suffix, new)) = found
        && allows(stem, suffix, word)
    {
        *word = format!("{stem}{new}");
    }
}

/// Step 1a.
fn plural(word: &mut String) {
    if word.len() == 4 && word.ends_with("ies") {
        word.pop();
    } else {
        replace(word, &PLURALS, |_, _, _| true);
    }
}

/// Step 1b: -ed and -ing, and what is left without them put in order.
fn past(word: &mut String) {
    if word.ends_with("ied") {
        word.truncate(word.len() - if word.len() == 4 { "d".len() } else { "ed".len() });
        return;
    }
    if let Some(stem) = word.strip_suffix("eed") {
        if measure(stem) > 0 {
            word.pop();
        }
        return;
    }
    let stem = word.strip_suffix("ed").or_else(|| word.strip_suffix("ing"));
    let Some(stem) = stem.filter(|stem| has_vowel(stem)) else { return };
    let mut stem = stem.to_owned();
    if ["at", "bl", "iz"].iter().any(|end| stem.ends_with(end)) {
        stem.push('e');
    } else if ends_in_double_consonant(&stem) {
        if !stem.ends_with(['l', 's', 'z']) {
            stem.pop();
        }
    } else if measure(&stem) == 1 && is_short(&stem) {
        stem.push('e');
    }
    *word = stem;
}

/// Step 1c.
fn final_y(word: &mut String) {
    let Some(stem) = word.strip_suffix('y') else { return };
    if stem.len() > 1 && consonants(stem).last() == Some(&true) {
        word.pop();
        word.push('i');
    }
}

/// Step 5: a last e, and one of two l.
fn final_e(word: &mut String) {
    if let Some(stem) = word.strip_suffix('e') {
        let measure = measure(stem);
        if measure > 1 || (measure == 1 && !is_short(stem)) {
            word.pop();
        }
    }
    if word.ends_with("ll") && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_are_those_of_nltk() {
        let words = include_str!("../tests/goldens/stems.tsv");
        assert!(words.lines().count() > 1000);
        for (word, expected) in words.lines().map(|line| line.split_once('\t').unwrap()) {
            assert_eq!(stem(word), expected, "{word}");
        }
    }

    #[test]
    fn the_longest_word_is_stemmed_in_no_time() {
        assert_eq!(stem(&"y".repeat(1 << 20)).len(), 1 << 20);
    }
}
