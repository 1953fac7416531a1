// SPDX-License-Identifier: Apache-2.0
#include "json.h"

#include <string.h>

enum { SURROGATE_HIGH = 0xD800, SURROGATE_LOW = 0xDC00, SURROGATE_END = 0xE000, UNICODE_END = 0x110000 };

struct cursor {
    struct json *json;
    uint32_t at, length;
};

static bool reject(struct cursor *cursor, const char *why)
{
    cursor->json->why = why;
    cursor->json->wrong = cursor->at;
    return false;
}

// The next byte, or -1 at the end of the text: no byte of a text is outside 0 to 255.
static int peek(const struct cursor *cursor)
{
    return cursor->at < cursor->length ? (unsigned char)cursor->json->text[cursor->at] : -1;
}

static void skip_space(struct cursor *cursor)
{
    for (int c = peek(cursor); c == ' ' || c == '\t' || c == '\n' || c == '\r'; c = peek(cursor))
        cursor->at++;
}

static int hex_digit(int c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// Four hexadecimal digits, or -1.
static int parse_hex(struct cursor *cursor)
{
    int number = 0;
    for (int i = 0; i < 4; i++, cursor->at++) {
        const int digit = hex_digit(peek(cursor));
        if (digit < 0)
            return -1;
        number = number << 4 | digit;
    }
    return number;
}

// The scalar value of an escape behind its backslash, or -1.
static int parse_escape(struct cursor *cursor)
{
    static const char letters[] = "\"\"\\\\//b\bf\fn\nr\rt\t"; // the letter, then what it stands for
    const int c = peek(cursor);
    if (c < 0)
        return -1;
    cursor->at++;
    for (size_t i = 0; i + 1 < sizeof(letters); i += 2)
        if (letters[i] == c)
            return (unsigned char)letters[i + 1];
    const int high = c == 'u' ? parse_hex(cursor) : -1;
    if (high < SURROGATE_HIGH || high >= SURROGATE_END)
        return high;
    if (high >= SURROGATE_LOW || peek(cursor) != '\\')
        return -1;
    cursor->at++;
    if (peek(cursor) != 'u')
        return -1;
    cursor->at++;
    const int low = parse_hex(cursor);
    if (low < SURROGATE_LOW || low >= SURROGATE_END)
        return -1;
    return 0x10000 + ((high - SURROGATE_HIGH) << 10 | (low - SURROGATE_LOW));
}

// One character in UTF-8, in its shortest form and no surrogate; or -1.
static int parse_utf8(struct cursor *cursor)
{
    const int lead = peek(cursor);
    cursor->at++;
    if (lead < 0x80)
        return lead;
    const int more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (lead < 0xC2 || lead > 0xF4)
        return -1;
    int number = lead & (0x3F >> more);
    for (int i = 0; i < more; i++, cursor->at++) {
        const int c = peek(cursor);
        if ((c & 0xC0) != 0x80)
            return -1;
        number = number << 6 | (c & 0x3F);
    }
    const int least = more == 3 ? 0x10000 : more == 2 ? 0x800 : 0x80;
    const bool is_surrogate = number >= SURROGATE_HIGH && number < SURROGATE_END;
    return number < least || is_surrogate || number >= UNICODE_END ? -1 : number;
}

static bool parse_string(struct cursor *cursor)
{
    cursor->at++; // the quote
    for (;;) {
        const int c = peek(cursor);
        if (c < 0)
            return reject(cursor, "a string has no end");
        if (c == '"') {
            cursor->at++;
            return true;
        }
        if (c < ' ')
            return reject(cursor, "a control character in a string");
        if (c != '\\') {
            if (parse_utf8(cursor) < 0)
                return reject(cursor, "a string is not UTF-8");
            continue;
        }
        cursor->at++;
        if (parse_escape(cursor) < 0)
            return reject(cursor, "an escape that stands for no character");
    }
}

static bool skip_digits(struct cursor *cursor)
{
    const uint32_t begin = cursor->at;
    while (peek(cursor) >= '0' && peek(cursor) <= '9')
        cursor->at++;
    return cursor->at > begin;
}

static bool parse_number(struct cursor *cursor)
{
    if (peek(cursor) == '-')
        cursor->at++;
    if (peek(cursor) == '0')
        cursor->at++;
    else if (!skip_digits(cursor))
        return reject(cursor, "not a value");
    if (peek(cursor) == '.') {
        cursor->at++;
        if (!skip_digits(cursor))
            return reject(cursor, "a number without digits behind its point");
    }
    if (peek(cursor) == 'e' || peek(cursor) == 'E') {
        cursor->at++;
        if (peek(cursor) == '+' || peek(cursor) == '-')
            cursor->at++;
        if (!skip_digits(cursor))
            return reject(cursor, "a number without digits in its exponent");
    }
    return true;
}

static bool parse_word(struct cursor *cursor, const char *word)
{
    const size_t length = strlen(word);
    if (cursor->length - cursor->at < length || memcmp(cursor->json->text + cursor->at, word, length))
        return reject(cursor, "not a value");
    cursor->at += (uint32_t)length;
    return true;
}

static bool parse_value(struct cursor *cursor, int depth);

// A name or a value inside an array or object, chained to the one before it, whose index is *last; 0: it is the first.
static bool parse_inside(struct cursor *cursor, uint32_t container, uint32_t *last, int depth)
{
    struct json *json = cursor->json;
    const uint32_t index = json->count;
    if (!parse_value(cursor, depth))
        return false;
    if (*last)
        json->values[*last].next = index;
    else
        json->values[container].first = index;
    *last = index;
    return true;
}

static bool parse_container(struct cursor *cursor, uint32_t container, int depth)
{
    const bool is_object = cursor->json->values[container].type == JSON_OBJECT;
    const int closing = is_object ? '}' : ']';
    uint32_t last = 0;
    if (depth == JSON_DEPTH)
        return reject(cursor, "nested too deep");
    cursor->at++; // the bracket
    skip_space(cursor);
    if (peek(cursor) == closing) {
        cursor->at++;
        return true;
    }
    for (;;) {
        if (is_object) {
            skip_space(cursor);
            if (peek(cursor) != '"')
                return reject(cursor, "a member without a name");
            if (!parse_inside(cursor, container, &last, depth + 1))
                return false;
            skip_space(cursor);
            if (peek(cursor) != ':')
                return reject(cursor, "a member without a value");
            cursor->at++;
        }
        if (!parse_inside(cursor, container, &last, depth + 1))
            return false;
        skip_space(cursor);
        const int c = peek(cursor);
        if (c != ',' && c != closing)
            return reject(cursor, is_object ? "an object has no end" : "an array has no end");
        cursor->at++;
        if (c == closing)
            return true;
    }
}

static enum json_type type_of(int c)
{
    switch (c) {
    case 'n':
        return JSON_NULL;
    case 'f':
        return JSON_FALSE;
    case 't':
        return JSON_TRUE;
    case '"':
        return JSON_STRING;
    case '[':
        return JSON_ARRAY;
    case '{':
        return JSON_OBJECT;
    default:
        return JSON_NUMBER;
    }
}

// Recursion is bounded by JSON_DEPTH.
static bool parse_value(struct cursor *cursor, int depth)
{
    struct json *json = cursor->json;
    bool is_valid = false;
    skip_space(cursor);
    if (json->count == JSON_VALUES)
        return reject(cursor, "too many values");
    const uint32_t index = json->count++;
    const enum json_type type = type_of(peek(cursor));
    json->values[index] = (struct json_value){.begin = cursor->at, .type = type};
    switch (type) {
    case JSON_NULL:
        is_valid = parse_word(cursor, "null");
        break;
    case JSON_FALSE:
        is_valid = parse_word(cursor, "false");
        break;
    case JSON_TRUE:
        is_valid = parse_word(cursor, "true");
        break;
    case JSON_NUMBER:
        is_valid = parse_number(cursor);
        break;
    case JSON_STRING:
        is_valid = parse_string(cursor);
        break;
    case JSON_ARRAY:
    case JSON_OBJECT:
        is_valid = parse_container(cursor, index, depth);
        break;
    }
    json->values[index].end = cursor->at;
    return is_valid;
}

bool json_parse(struct json *json, const char *text, size_t length)
{
    struct cursor cursor = {.json = json, .length = (uint32_t)length};
    json->text = text;
    json->why = NULL;
    json->wrong = json->count = 0;
    if (length > UINT32_MAX / 2)
        return reject(&cursor, "too long");
    if (!parse_value(&cursor, 0))
        return false;
    skip_space(&cursor);
    return peek(&cursor) < 0 || reject(&cursor, "more than one value");
}

json_ref json_first(const struct json *json, json_ref container)
{
    const bool has_inside = container->type == JSON_ARRAY || container->type == JSON_OBJECT;
    return has_inside && container->first ? &json->values[container->first] : NULL;
}

json_ref json_next(const struct json *json, json_ref value)
{
    return value->next ? &json->values[value->next] : NULL;
}

// A place in a string that was accepted; at its closing quote there is no character more.
static struct cursor open_string(const struct json *json, json_ref value)
{
    // A cursor reads alone here; what json_parse writes by it, it does not write in a string that was accepted.
    return (struct cursor){.json = (struct json *)json, .at = value->begin + 1, .length = value->end - 1};
}

static int next_character(struct cursor *cursor)
{
    if (peek(cursor) != '\\')
        return peek(cursor) < 0 ? -1 : parse_utf8(cursor);
    cursor->at++;
    return parse_escape(cursor);
}

bool json_begins(const struct json *json, json_ref value, const char *prefix)
{
    if (value->type != JSON_STRING)
        return false;
    struct cursor cursor = open_string(json, value);
    for (; *prefix; prefix++)
        if (next_character(&cursor) != (unsigned char)*prefix)
            return false;
    return true;
}

bool json_is(const struct json *json, json_ref value, const char *expected)
{
    if (value->type != JSON_STRING)
        return false;
    struct cursor cursor = open_string(json, value);
    for (; *expected; expected++)
        if (next_character(&cursor) != (unsigned char)*expected)
            return false;
    return peek(&cursor) < 0;
}

json_ref json_member(const struct json *json, json_ref object, const char *name, bool *is_twice)
{
    json_ref found = NULL;
    if (object->type != JSON_OBJECT)
        return NULL;
    for (json_ref key = json_first(json, object); key; key = json_next(json, json_next(json, key))) {
        if (!json_is(json, key, name))
            continue;
        if (found)
            *is_twice = true;
        found = json_next(json, key);
    }
    return found;
}

// The bytes of a character in UTF-8; how many there are.
static size_t encode(int number, char out[4])
{
    static const unsigned char leads[] = {0, 0, 0xC0, 0xE0, 0xF0};
    const size_t count = number < 0x80 ? 1 : number < 0x800 ? 2 : number < 0x10000 ? 3 : 4;
    for (size_t i = count; i > 1; i--, number >>= 6)
        out[i - 1] = (char)(0x80 | (number & 0x3F));
    out[0] = (char)(leads[count] | number);
    return count;
}

bool json_copy(const struct json *json, json_ref value, char *out, size_t size)
{
    char bytes[4];
    size_t used = 0;
    if (value->type != JSON_STRING)
        return false;
    struct cursor cursor = open_string(json, value);
    while (peek(&cursor) >= 0) {
        const int number = next_character(&cursor);
        const size_t count = encode(number, bytes);
        if (number == 0 || used + count >= size)
            return false;
        memcpy(out + used, bytes, count);
        used += count;
    }
    if (used >= size)
        return false;
    out[used] = '\0';
    return true;
}

bool json_count(const struct json *json, json_ref value, uint32_t *out)
{
    uint32_t number = 0;
    if (value->type != JSON_NUMBER)
        return false;
    for (uint32_t at = value->begin; at < value->end; at++) {
        const char c = json->text[at];
        if (c < '0' || c > '9' || number > (UINT32_MAX - 9) / 10)
            return false;
        number = number * 10 + (uint32_t)(c - '0');
    }
    *out = number;
    return true;
}
