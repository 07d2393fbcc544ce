package lvm

import (
	"strconv"
	"strings"
)

// The text is that of lvm.conf(5): sections in braces, and values that are
// numbers, strings in double quotes or lists of both in brackets; # begins a
// comment.
const (
	maxDepth  = 8
	maxValues = 1 << 17 // about 100 bytes each
)

// section is a named group of values and sections.
type section struct {
	values   map[string]value
	sections map[string]*section
}

// value is a string, a number or a list.
type value struct {
	text   string
	number int64
	isText bool
	isList bool
	list   []value
}

type parser struct {
	b     []byte
	at    int
	count int
}

// parse parses a whole text.
func parse(b []byte) (*section, error) {
	for len(b) > 0 && b[len(b)-1] == 0 {
		b = b[:len(b)-1]
	}
	p := &parser{b: b}
	return p.section(0)
}

func (p *parser) fail(what string) error {
	return damaged("metadata text: byte %d: %s", p.at, what)
}

// peek is the next byte that is neither space nor comment, 0 at the end.
func (p *parser) peek() byte {
	for ; p.at < len(p.b); p.at++ {
		switch c := p.b[p.at]; c {
		case ' ', '\t', '\n', '\r':
		case '#':
			for p.at+1 < len(p.b) && p.b[p.at+1] != '\n' {
				p.at++
			}
		default:
			return c
		}
	}
	return 0
}

func (p *parser) word() string {
	start := p.at
	for p.at < len(p.b) && strings.IndexByte(" \t\r\n#={}[],\"", p.b[p.at]) < 0 && p.b[p.at] != 0 {
		p.at++
	}
	return string(p.b[start:p.at])
}

// section parses up to the brace that ends it, or the end of the text.
func (p *parser) section(depth int) (*section, error) {
	if depth > maxDepth {
		return nil, p.fail("sections are nested too deeply")
	}
	s := &section{values: map[string]value{}, sections: map[string]*section{}}
	for {
		switch p.peek() {
		case 0:
			if depth > 0 || p.at < len(p.b) {
				return nil, p.fail("the text ends in a section")
			}
			return s, nil
		case '}':
			if depth == 0 {
				return nil, p.fail("a brace too many")
			}
			p.at++
			return s, nil
		}
		name := p.word()
		if p.count++; name == "" || p.count > maxValues {
			return nil, p.fail("no name, or too many of them")
		}
		_, twice := s.values[name]
		if _, again := s.sections[name]; twice || again {
			return nil, p.fail("a name stands twice")
		}
		var err error
		switch p.peek() {
		case '{':
			p.at++
			s.sections[name], err = p.section(depth + 1)
		case '=':
			p.at++
			s.values[name], err = p.value(true)
		default:
			err = p.fail("neither a value nor a section")
		}
		if err != nil {
			return nil, err
		}
	}
}

func (p *parser) value(lists bool) (v value, err error) {
	switch c := p.peek(); {
	case c == '"':
		v.isText = true
		v.text, err = p.quoted()
	case c == '[' && lists:
		v.isList = true
		p.at++
		for p.peek() != ']' {
			e, err := p.value(false)
			if err != nil {
				return v, err
			}
			if p.count++; p.count > maxValues {
				return v, p.fail("too many values")
			}
			v.list = append(v.list, e)
			if p.peek() == ',' {
				p.at++
			} else if p.peek() != ']' {
				return v, p.fail("a list does not end")
			}
		}
		p.at++
	default:
		w := p.word()
		if v.number, err = strconv.ParseInt(w, 10, 64); err != nil {
			return v, p.fail("a value that is no number")
		}
	}
	return v, err
}

func (p *parser) quoted() (string, error) {
	var s []byte
	for p.at++; p.at < len(p.b); p.at++ {
		switch c := p.b[p.at]; c {
		case '"':
			p.at++
			return string(s), nil
		case '\\':
			if p.at++; p.at < len(p.b) {
				s = append(s, p.b[p.at])
			}
		default:
			s = append(s, c)
		}
	}
	return "", p.fail("a string does not end")
}

// number is a value that must be a number in [low, high].
func (s *section) number(name string, low, high int64) (int64, error) {
	v, ok := s.values[name]
	if !ok || v.isText || v.isList || v.number < low || v.number > high {
		return 0, damaged("metadata text: %s = %d, want %d to %d", name, v.number, low, high)
	}
	return v.number, nil
}

// text is a value that must be a string.
func (s *section) text(name string) (string, error) {
	v, ok := s.values[name]
	if !ok || !v.isText {
		return "", damaged("metadata text: %s is no string", name)
	}
	return v.text, nil
}

// words is a value that is a list of strings, or missing.
func (s *section) words(name string) ([]string, error) {
	v, ok := s.values[name]
	if !ok {
		return nil, nil
	}
	var words []string
	for _, e := range v.list {
		if !e.isText {
			return nil, damaged("metadata text: %s", name)
		}
		words = append(words, e.text)
	}
	if !v.isList {
		return nil, damaged("metadata text: %s is no list", name)
	}
	return words, nil
}
