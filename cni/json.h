// SPDX-License-Identifier: Apache-2.0
//
// A strict reader of JSON (RFC 8259) for a plugin that runs as root on what others wrote.  It reads a text in one pass
// into a table of values and leaves the text as it is; nothing is allocated.
//
// Invariant: a document is accepted whole or rejected; at most JSON_VALUES values and JSON_DEPTH levels are accepted,
// and no value refers to anything outside the text.
//
// Stricter than most readers: text must be UTF-8, escapes must be Unicode scalar values, and a member that is asked for
// must not be there twice, because two readers would disagree on which of the two counts.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { JSON_VALUES = 16384, JSON_DEPTH = 32 }; // arbitrary: a plugin's input has some hundreds and seven

enum json_type { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

// A value.  begin, end: its text, quotes and brackets included.  A member of an object is two values in a row, its name
// and its value.  next: the index of the value behind it in the same array or object, 0 at the end; first: that of the
// first value inside, 0 in an empty one.
struct json_value {
    uint32_t begin, end;
    uint32_t next, first;
    enum json_type type;
};

// The document's own value is values[0].  why: what is wrong with the text, at offset `wrong`, when it was rejected.
struct json {
    const char *text;
    const char *why;
    uint32_t wrong;
    uint32_t count;
    struct json_value values[JSON_VALUES];
};

typedef const struct json_value *json_ref;

// Whether the text is one JSON document.  The text must outlive the result.
bool json_parse(struct json *json, const char *text, size_t length);

// The first value of an array or the first name of an object, and the one behind; NULL at the end.  A member's value is
// json_next of its name.
json_ref json_first(const struct json *json, json_ref container);
json_ref json_next(const struct json *json, json_ref value);

// Whether a string, its escapes resolved, is this text.
bool json_is(const struct json *json, json_ref value, const char *expected);

// Whether a string, its escapes resolved, begins with this text.
bool json_begins(const struct json *json, json_ref value, const char *prefix);

// The value of an object's member, NULL when there is none.  is_twice: set when there are several, else left as it is.
json_ref json_member(const struct json *json, json_ref object, const char *name, bool *is_twice);

// A string with its escapes resolved, and a NUL behind; false when it does not fit or contains a NUL.
bool json_copy(const struct json *json, json_ref value, char *out, size_t size);

// A whole number without sign, fraction and exponent; false for every other value.
bool json_count(const struct json *json, json_ref value, uint32_t *out);
